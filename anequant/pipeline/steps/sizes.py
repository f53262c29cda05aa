"""What steps put their memory and work together from: sizes of weights and states, in bytes and elements.

Written down from what the code holds at once, in bytes an element, and compared with measured peaks by
tools/measure/measure_memory.py. A step's own part stands in its class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from anequant.architectures.spec import EMBEDDING, ModelSpec
from anequant.checkpoints.header import BITS
from anequant.checkpoints.reader import Checkpoint
from anequant.jobs.step import Work
from anequant.quantization.kernels import TILE, count_tiles
from anequant.recipe import Calibration, Recipe
from anequant.reference.forward import HEAD_ROWS, WINDOWS_AT_ONCE

FLOAT16, FLOAT32, FLOAT64 = 2, 4, 8
ALLOCATOR = 64 << 20
"""Bytes of freed blocks that glibc does not give back: those below its threshold, which grows to 32 MB."""

KEPT_STATES, KEPT_INNER = 16, 6
"""What autograd keeps of a token in a layer: vectors as wide as the stream, and as the MLP's inside."""

CORE_AND_CODES = FLOAT32 + 1
PACKING_PASSES = 12
"""Times that finding codes again and packing them goes over a weight, in float32."""


@dataclass(frozen=True, eq=False)
class Facts:
    """What the steps of quantizing are foreseen from, without reading a weight.

    `checkpoint` is the float model, `written` the quantized one as its headers will say, both with their
    shapes alone.
    """

    checkpoint: Checkpoint
    written: Checkpoint
    recipe: Recipe
    calibration: Calibration

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @cached_property
    def source_bytes(self) -> int:
        """The bytes of an element as the float model stores it."""
        return BITS[self.checkpoint.tensors[f"{EMBEDDING}.weight"].dtype] // 8

    @property
    def windows(self) -> tuple[int, int]:
        """Calibration windows, and tokens in each."""
        return self.calibration.samples, self.calibration.length

    @property
    def walked(self) -> tuple[int, int] | None:
        """The windows that walk through the layers while these are rounded; None where none do."""
        calibrated = self.recipe.feeds_back or self.recipe.static_activations
        return self.windows if calibrated else None

    @cached_property
    def source_size(self) -> int:
        """The bytes of the whole float model."""
        return count_stored_bytes(self.checkpoint, "model.", "lm_head.")

    @cached_property
    def written_size(self) -> int:
        """The bytes of the whole quantized model."""
        return count_stored_bytes(self.written, "model.", "lm_head.")

    def count_moves(self, *beginnings: str) -> tuple[int, int]:
        """Return the bytes of the tensors whose names begin so, as they are read and as they are written."""
        return count_stored_bytes(self.checkpoint, *beginnings), count_stored_bytes(self.written, *beginnings)


def predict_peak(base: int, held: int) -> int:
    """Return the peak of a process whose imports take `base` and which holds `held` bytes at once."""
    return base + held + min(held, ALLOCATOR)


def count_stored_bytes(checkpoint: Checkpoint, *beginnings: str) -> int:
    """Return the bytes of the tensors whose names begin so, once each."""
    found = (info for name, info in checkpoint.tensors.items() if name.startswith(beginnings))
    return sum(math.prod(info.shape) * BITS[info.dtype] // 8 for info in found)


def count_table_weights(spec: ModelSpec) -> int:
    """Return the number of weights of the embedding, which the head has too."""
    return spec.vocab_size * spec.hidden_size


def count_state_bytes(spec: ModelSpec, windows: tuple[int, int] | None) -> int:
    """Return the bytes of hidden states of (windows, length) in the float model and the quantized one."""
    return 0 if windows is None else 2 * FLOAT32 * math.prod(windows) * spec.hidden_size


def count_advancing_bytes(spec: ModelSpec, windows: tuple[int, int]) -> int:
    """Return the bytes of all windows after a layer, of those before, and of a few on their way."""
    count, length = windows
    few = WINDOWS_AT_ONCE * length * (2 * spec.hidden_size + 3 * spec.intermediate_size)
    return FLOAT32 * (2 * count * length * spec.hidden_size + few)


def count_autograd_bytes(spec: ModelSpec, tokens: int) -> int:
    """Return the bytes that autograd keeps of so many tokens in one layer."""
    return FLOAT32 * tokens * (KEPT_STATES * spec.hidden_size + KEPT_INNER * spec.intermediate_size)


def count_coupling_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the couplings of a layer's linears."""
    tiles = sum(count_tiles(spec.width(linear.output)) for linear in spec.architecture.linears)
    return FLOAT32 * tiles * TILE**2


def count_reference_bytes(spec: ModelSpec, source: int) -> int:
    """Return the bytes that transformers' logits hold, layer by layer: the embedding; a layer and the linear
    that runs; or the head and the rows of it that are widened. `source` is the bytes of an element."""
    widened = FLOAT32 * min(HEAD_ROWS, spec.vocab_size) * spec.hidden_size
    one_layer = source * spec.layer_weights + FLOAT32 * max(spec.linear_weights.values())
    return max(source * count_table_weights(spec) + widened, one_layer)


def count_packed_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes that a package of palettized weights of these sizes holds: one an element, and one
    weight as it was read."""
    return sum(sizes) + (FLOAT16 + 2) * max(sizes)


def count_compared_bytes(size: int) -> int:
    """Return the bytes of a quantized weight that is read back: stored, its codes, what these stand for."""
    return (2 * FLOAT16 + 2) * size


def count_forward_work(spec: ModelSpec, windows: tuple[int, int], passes: float) -> Work:
    """Return the work of windows that go through all layers and the head so many times."""
    everything = spec.num_layers * spec.layer_weights + count_table_weights(spec)
    return Work(2 * passes * math.prod(windows) * everything, 4 * passes * everything)


def count_packing_work(size: int) -> Work:
    """Return the work of finding codes again in so many stored weights, and of packing them."""
    return Work(0, 4 * PACKING_PASSES * size)
