"""QuantizedLinear, the definition of truth: writer, reader, lowering and runtime are tested against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.quantization.scales import spread

ROWS = 1024


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
        return (self.codebook.numel() - 1).bit_length()

    def dequantize(self) -> Tensor:
        """The weight it stands for, float32 [out, in]."""
        weight = torch.empty(self.codes.shape)
        for start in range(0, weight.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            codes = self.codes[rows].reshape(-1).int()
            torch.index_select(self.codebook, 0, codes, out=weight[rows].view(-1))
        return weight.mul_(spread(self.output_scale, weight.shape[1])).mul_(self.input_scale)
