"""QuantizedLinear, the definition of truth: writer, reader, lowering and runtime are tested against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anequant.quantization.codebook import count_code_bits
from anequant.quantization.scales import spread

ROWS = 1024
ERROR_ROWS = 256


@dataclass(frozen=True)
class FloatTable:
    """An embedding or a head that stays float16: `rows` of it, read some at a time.

    read   the rows of a slice, [n, columns], as they are stored
    scale  multiplies them
    """

    rows: range
    columns: int
    read: Callable[[slice], Tensor]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.columns

    def part(self, rows: slice) -> FloatTable:
        return replace(self, rows=self.rows[rows])

    def blocks(self) -> Iterator[Tensor]:
        """float16 [n, columns], n at most ROWS."""
        for start in range(self.rows.start, self.rows.stop, ROWS):
            yield self.read(slice(start, min(start + ROWS, self.rows.stop))).half() * self.scale


@dataclass(frozen=True)
class QuantizedLinear:
    """W[r, c] ~ output_scale[r] * codebook[codes[r, c]] * input_scale[c], and a bias.

    codes         uint8 [out, in]
    codebook      float32 [2**bits], strictly ascending
    input_scale   float32 [in], positive
    output_scale  float32 [out], positive here; a checkpoint made elsewhere may have negative ones; or
                  [out, groups], one per row and in / groups consecutive columns
    bias          float32 [out] or None

    Codebook and scales hold numbers that float16 represents exactly, so every reader sees the same.
    """

    codes: Tensor
    codebook: Tensor
    input_scale: Tensor
    output_scale: Tensor
    bias: Tensor | None = None

    @property
    def bits(self) -> int:
        return count_code_bits(self.codebook.numel())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight it stands for, [out, in]: computed in float32, some rows after the other."""
        weight = torch.empty(self.codes.shape, dtype=dtype)
        for start in range(0, weight.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            values = torch.index_select(self.codebook, 0, self.codes[rows].reshape(-1).int())
            values = values.view(-1, weight.shape[1])
            values.mul_(spread(self.output_scale[rows], weight.shape[1])).mul_(self.input_scale)
            weight[rows] = values
        return weight


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs|| of two tensors of one shape, `theirs` float32.

    Squares are summed in float64, over blocks of rows so small that their copies do not count.
    """
    difference = size = 0.0
    blocks = (torch.split(tensor, ERROR_ROWS) for tensor in (ours, theirs))
    for mine, original in zip(*blocks, strict=True):
        difference += float((mine.float() - original).square_().sum(dtype=torch.float64))
        size += float(original.square().sum(dtype=torch.float64))
    return math.sqrt(difference / max(size, 1e-60))
