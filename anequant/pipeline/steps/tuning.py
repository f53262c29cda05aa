"""Tuning: the rounded model is read again, distilled, and written to its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.calibration.distill import (
    HELD_OUT,
    WINDOWS_A_STEP,
    Budget,
    Course,
    TuneResult,
    distill,
    hold_out_windows,
)
from anequant.calibration.student import Heads, Student, TunableLayer
from anequant.calibration.tokens import read_fresh_tokens
from anequant.checkpoints.layers import load_layer, open_quantized
from anequant.checkpoints.quantized import store
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.writer import CheckpointWriter
from anequant.jobs.control import Progress
from anequant.jobs.step import Step, Work
from anequant.pipeline.quantizing import Quantizing
from anequant.pipeline.steps.sizes import (
    FLOAT16,
    FLOAT32,
    Facts,
    count_autograd_bytes,
    count_forward_work,
    count_table_weights,
)
from anequant.quantization.tunable_linear import finish_tuning, start_tuning
from anequant.reference.forward import WINDOWS_AT_ONCE
from anequant.reference.head_loss import PIECE

PASSES = 5
"""Times that a step goes through the model: in float, forward, forward again and back."""

ASSUMED_STEPS = 100
"""Steps that a budget of minutes is taken for where work is counted."""

MOST_WINDOWS = 2048
"""The most windows to learn from."""

LATENT_BYTES = 12
"""Bytes that a latent value takes with its moments."""


@dataclass(frozen=True, eq=False)
class Tune(Step[Quantizing, TuneResult]):
    """Distil codes, scales, codebooks, biases and norms from the float model."""

    stage = "quantize"
    kind = "tuning"
    result = TuneResult

    facts: Facts

    @property
    def title(self) -> str:
        return "tune"

    @property
    def moves(self) -> tuple[int, int]:
        return self.facts.written_size + self.facts.source_size, self.facts.written_size

    @property
    def holds(self) -> int:
        """Latent values with their moments and codes twice; a layer, its gradients and the same in unit
        domain; the tables, the heads widened; and states between layers."""
        spec, length = self.facts.spec, self.facts.calibration.length
        states = FLOAT32 * HELD_OUT * length * spec.hidden_size * 3
        between = FLOAT32 * WINDOWS_A_STEP * length * spec.hidden_size * (spec.num_layers + 4)
        tables = (FLOAT16 + 2 * FLOAT32) * count_table_weights(spec)
        logits = 6 * FLOAT32 * PIECE * spec.vocab_size
        latent = (LATENT_BYTES + 2) * spec.num_layers * spec.layer_weights
        busy = count_autograd_bytes(spec, min(WINDOWS_AT_ONCE, WINDOWS_A_STEP) * length)
        layer = 5 * FLOAT32 * spec.layer_weights
        return latent + tables + max(states, between) + max(logits, busy + layer)

    @property
    def cost(self) -> Work:
        steps = self.facts.recipe.tune or ASSUMED_STEPS
        windows = WINDOWS_A_STEP, self.facts.calibration.length
        return count_forward_work(self.facts.spec, windows, PASSES * steps)

    def run(self, state: Quantizing, progress: Progress) -> TuneResult:
        with state.new_writer(state.folder) as writer:
            return tune_checkpoint(state, writer, progress)

    def accept(self, state: Quantizing, result: TuneResult) -> None:
        state.tuning = result

    def tell(self, result: TuneResult) -> Sequence[str]:
        return (f"held-out KL {result.held_out_before:.4f} to {result.held_out_after:.4f}",)


def tune_checkpoint(state: Quantizing, writer: CheckpointWriter, progress: Progress) -> TuneResult:
    """Write the quantized checkpoint that the pass left again, distilled.

    It learns from windows of the calibration's sources.
    """
    calibration, original, model = state.request.calibration, state.checkpoint, state.model
    quantized = open_quantized(state.untuned)
    spec = quantized.spec
    budget = Budget(state.recipe.tune, 60 * state.recipe.tune_minutes)
    most = budget.steps * WINDOWS_A_STEP + HELD_OUT if budget.steps else MOST_WINDOWS
    tokens = read_fresh_tokens(
        calibration, original, min(most, MOST_WINDOWS), progress.part("tune", 0.0, 0.1)
    )
    layers = []
    for number in range(spec.num_layers):
        loaded, floats = load_layer(quantized, number), model.float_layer(number)
        linears = {
            name: start_tuning(linear, floats[f"{name}.weight"]) for name, linear in loaded.linears.items()
        }
        gains = {name: gain.float().requires_grad_() for name, gain in loaded.gains.items()}
        layers.append(TunableLayer(linears, gains))
    heads = Heads(
        original.read(original.head_name).float(),
        quantized.read(f"{HEAD}.weight").float(),
        quantized.read(f"{FINAL_NORM}.weight").float().requires_grad_(),
    )
    embedding = quantized.read(f"{EMBEDDING}.weight")
    student = Student(spec, original, embedding, layers, heads, quantized.online.rotations)
    course = Course(*hold_out_windows(tokens), budget, calibration.seed)
    tuned, result = distill(student, course, state.journal.folder, progress.part("tune", 0.1, 1.0))
    _copy(quantized, EMBEDDING, writer)
    for number, layer in enumerate(tuned.layers):
        prefix = layer_prefix(number)
        for name, gain in layer.gains.items():
            writer.write(f"{prefix}{name}.weight", gain.half())
        for name, linear in layer.linears.items():
            finished = finish_tuning(linear, prefix + name)
            for tensor, value in store(prefix + name, finished, bias=True).items():
                writer.write(tensor, value)
    writer.write(f"{FINAL_NORM}.weight", tuned.gain.half())
    _copy(quantized, HEAD, writer)
    return result


def _copy(checkpoint: Checkpoint, table: str, writer: CheckpointWriter) -> None:
    """Write the tensors of the embedding or the head as they are, in the order of their file."""
    for name in checkpoint.tensors:
        if name.startswith(f"{table}."):
            writer.write(name, checkpoint.read(name))
