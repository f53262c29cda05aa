"""Tuning a quantized checkpoint: a copy of it, with codes as they are and better numbers around them."""

from __future__ import annotations

from pathlib import Path

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.calibration.distill import Course, Heads, LearnResult, Lesson, Student, TunableLayer, distill
from anequant.calibration.tokens import SELF, read_calibration_tokens
from anequant.checkpoints.layers import load_layer, open_quantized
from anequant.checkpoints.quantized import store
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.writer import CheckpointWriter
from anequant.jobs.control import Progress
from anequant.quantization.tunable_linear import start_tuning
from anequant.recipe import Calibration
from anequant.reference.forward import run_to_final_states

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
    source = Calibration(SELF, windows, calibration.length, calibration.seed + 1)
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
