"""Tuning: the rounded model is read again, distilled, and written to its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.calibration.distill import Course, Heads, LearnResult, Lesson, Student, TunableLayer, distill
from anequant.calibration.tokens import SELF, read_calibration_tokens
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
    count_forward_work,
    count_state_bytes,
    count_table_weights,
)
from anequant.quantization.tunable_linear import start_tuning
from anequant.recipe import Calibration
from anequant.reference.forward import run_to_final_states

PASSES = 3
"""Times that a step goes through the model: forward, and back through what is tuned."""


@dataclass(frozen=True, eq=False)
class Tune(Step[Quantizing, LearnResult]):
    """Distil scales, codebooks, biases and norms from the float model."""

    stage = "quantize"
    kind = "tuning"
    result = LearnResult

    facts: Facts

    @property
    def title(self) -> str:
        return "tune"

    @property
    def moves(self) -> tuple[int, int]:
        return self.facts.written_size + self.facts.source_size, self.facts.written_size

    @property
    def holds(self) -> int:
        """What is tuned as codes, a layer with its gradients, both heads, and states between layers."""
        spec, windows = self.facts.spec, self.facts.windows
        kept = count_state_bytes(spec, windows) + FLOAT32 * math.prod(windows) * spec.hidden_size
        heads = (self.facts.source_bytes + FLOAT16 + FLOAT32) * count_table_weights(spec)
        return spec.num_layers * spec.layer_weights + kept + heads + 3 * FLOAT32 * spec.layer_weights

    @property
    def cost(self) -> Work:
        return count_forward_work(self.facts.spec, self.facts.windows, PASSES * self.facts.recipe.tune)

    def run(self, state: Quantizing, progress: Progress) -> LearnResult:
        steps, calibration = self.facts.recipe.tune, self.facts.calibration
        with state.new_writer(state.folder) as writer:
            return tune_checkpoint(state.untuned, self.facts.checkpoint, writer, steps, calibration, progress)

    def accept(self, state: Quantizing, result: LearnResult) -> None:
        state.tuning = result

    def tell(self, result: LearnResult) -> Sequence[str]:
        return (f"held-out KL {result.held_out_before:.4f} to {result.held_out_after:.4f}",)


MOST_WINDOWS = 96
HELD_OUT = 16


def tune_checkpoint(
    untuned: Path,
    original: Checkpoint,
    writer: CheckpointWriter,
    steps: int,
    calibration: Calibration,
    progress: Progress,
) -> LearnResult:
    """Write the quantized checkpoint `untuned` of the float model `original` again, distilled.

    The text is what the float model writes itself, never what rounding was calibrated on: to those tokens
    the codes are fitted already, and training on them only fits them further. Only `length` and `seed` of
    `calibration` are used.
    """
    quantized = open_quantized(untuned)
    spec = quantized.spec
    windows = min(MOST_WINDOWS, HELD_OUT + 2 * steps)
    source = Calibration((SELF,), windows, calibration.length, calibration.seed + 1)
    tokens = read_calibration_tokens(source, original, progress.part("tune", 0.0, 0.2))
    progress("tune: float model", 0.2)
    lesson = Lesson(
        quantized.read(f"{EMBEDDING}.weight")[tokens].float(), run_to_final_states(original, tokens)
    )
    layers = []
    for number in range(spec.num_layers):
        loaded = load_layer(quantized, number)
        linears = {name: start_tuning(linear) for name, linear in loaded.linears.items()}
        gains = {name: gain.float().requires_grad_() for name, gain in loaded.gains.items()}
        layers.append(TunableLayer(linears, gains))
    heads = Heads(
        original.read(original.head_name).float(),
        quantized.read(f"{HEAD}.weight").float(),
        quantized.read(f"{FINAL_NORM}.weight").float().requires_grad_(),
    )
    held_out, rest = lesson.windows(slice(HELD_OUT)), lesson.windows(slice(HELD_OUT, None))
    result = distill(
        Student(spec, layers, heads, quantized.online.rotations),
        Course(rest, held_out, steps, calibration.seed),
        progress.part("tune", 0.2, 1.0),
    )
    _copy(quantized, EMBEDDING, writer)
    for number, layer in enumerate(layers):
        prefix = layer_prefix(number)
        for name, gain in layer.gains.items():
            writer.write(f"{prefix}{name}.weight", gain.detach().half())
        for name, linear in layer.linears.items():
            for tensor, value in store(prefix + name, linear.finish(prefix + name), bias=True).items():
                writer.write(tensor, value)
    writer.write(f"{FINAL_NORM}.weight", heads.gain.detach().half())
    _copy(quantized, HEAD, writer)
    return result


def _copy(checkpoint: Checkpoint, table: str, writer: CheckpointWriter) -> None:
    """Write the tensors of the embedding or the head as they are, in the order of their file."""
    for name in checkpoint.tensors:
        if name.startswith(f"{table}."):
            writer.write(name, checkpoint.read(name))
