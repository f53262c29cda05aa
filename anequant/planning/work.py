"""How long a step takes: its multiplications and the bytes it goes over, on a machine measured for a moment.

An estimate: products of large matrices run at the measured rate, everything else at the rate of going over
memory, and float64 at half the rate of float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from anequant.architectures.spec import ModelSpec
from anequant.calibration.equivalence import PROBE_LENGTH
from anequant.recipe import Calibration, LowerOptions, Recipe
from anequant.reference.windows import DECODE_TOKENS, PREFILL_TOKENS, RANGE_TOKENS

MEASURED = 0.2
"""Seconds that each of the two rates is measured for."""
SIDE, ELEMENTS = 1024, 1 << 24
TURNING_PASSES, ROUNDING_PASSES = 24, 60
"""Times that turning and rounding go over a weight, in float32: measured on weights of 4096 x 4096."""
FEEDBACK, REFITTING, FACTORS = 5.0, 1.5, 4
"""Products of a weight with a Hessian that gptq and its target take, and a round of refinement without its
descent; Cholesky factors of a Hessian."""
PACKING_PASSES = 12


@dataclass(frozen=True)
class Work:
    """Multiplications and additions of matrix products, in float32, and bytes gone over."""

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Speed:
    """A second's flops and bytes."""

    flops: float
    bytes: float

    def seconds(self, work: Work) -> float:
        return work.flops / self.flops + work.bytes / self.bytes


def measure_speed() -> Speed:
    """Of this machine, with the threads that torch has, in about half a second."""
    matrix = torch.ones(SIDE, SIDE)
    values, target = torch.ones(ELEMENTS), torch.empty(ELEMENTS)
    return Speed(
        _rate(lambda: torch.mm(matrix, matrix), 2 * SIDE**3),
        _rate(lambda: torch.add(values, 1, out=target), 2 * 4 * ELEMENTS),
    )


def _rate(run: Callable[[], object], amount: float) -> float:
    run()
    begun, count = time.monotonic(), 0
    while (elapsed := time.monotonic() - begun) < MEASURED:
        run()
        count += 1
    return count * amount / elapsed


def forward(spec: ModelSpec, windows: tuple[int, int], passes: float) -> Work:
    """Windows through all layers and the head."""
    everything = spec.num_layers * spec.layer_weights + spec.vocab_size * spec.hidden_size
    return Work(2 * passes * math.prod(windows) * everything, 4 * passes * everything)


def sampling(spec: ModelSpec, calibration: Calibration, stored: int, *, resident: bool) -> Work:
    step = forward(spec, (calibration.samples, 1), passes=1)
    read = 0 if resident else 3 * stored
    return Work(step.flops * calibration.length, (step.bytes + read) * calibration.length)


def rotations(spec: ModelSpec, recipe: Recipe, windows: tuple[int, int]) -> Work:
    return forward(spec, windows, passes=2 + recipe.restarts + 4 * recipe.learn)


def table(spec: ModelSpec, bits: int) -> Work:
    size = spec.vocab_size * spec.hidden_size
    passes = TURNING_PASSES + (0 if bits == 16 else ROUNDING_PASSES)
    return Work(4 * PROBE_LENGTH * size, 4 * passes * size)


def layer(spec: ModelSpec, recipe: Recipe, windows: tuple[int, int] | None) -> Work:
    """Turning, the float64 probe, rounding, and what calibration adds."""
    size = spec.layer_weights
    probe = Work(2 * 2 * 2 * PROBE_LENGTH * size)
    passes = TURNING_PASSES + (0 if recipe.bits == 16 else ROUNDING_PASSES)
    todo = probe + Work(0, 4 * passes * size)
    if windows is None:
        return todo
    todo += walking(spec, windows)
    return todo + moments(spec, windows) + feedback(spec, recipe) if recipe.feeds_back else todo


def walking(spec: ModelSpec, windows: tuple[int, int]) -> Work:
    """A layer, once in each of two models."""
    count, length = windows
    attention = 2 * count * length**2 * spec.query_size
    return Work(2 * (2 * count * length * spec.layer_weights + attention))


def moments(spec: ModelSpec, windows: tuple[int, int]) -> Work:
    """Hessians, which are symmetric, and cross moments or moments of outputs, of a layer's inputs."""
    todo = Work()
    for group in spec.input_groups:
        rows, width = spec.shape(group[0])
        mixed = rows if group[0].norm is None else width
        todo += Work(math.prod(windows) * width * (width + 2 * mixed))
    return todo


def feedback(spec: ModelSpec, recipe: Recipe) -> Work:
    """Factors and calibrated rounding of a layer's linears."""
    products = FEEDBACK + recipe.refinement * (REFITTING + max(1, recipe.descent))
    todo = Work()
    for group in spec.input_groups:
        todo += Work(FACTORS * spec.width(group[0].input) ** 3 / 3)
    for linear in spec.architecture.linears:
        rows, width = spec.shape(linear)
        todo += Work(2 * products * rows * width**2 + recipe.refinement * width**3 / 3)
    return todo


def ranges(spec: ModelSpec) -> Work:
    size = spec.num_layers * spec.layer_weights
    return Work(2 * 4 * RANGE_TOKENS * size, 4 * PACKING_PASSES * size)


def packing(size: int) -> Work:
    """Codes found again in so many stored weights, and packed."""
    return Work(0, 4 * PACKING_PASSES * size)


def verification(spec: ModelSpec, options: LowerOptions) -> Work:
    """Constants compared, a prompt and single tokens through the packages, and transformers beside them."""
    size = spec.num_layers * spec.layer_weights + spec.vocab_size * spec.hidden_size
    steps = min(DECODE_TOKENS, options.context)
    return packing(2 * size) + Work(2 * 2 * (PREFILL_TOKENS + DECODE_TOKENS) * size, 4 * steps * size)
