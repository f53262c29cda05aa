"""QuantizedLinear, the definition of truth: writer, reader, lowering and runtime are tested against it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QuantizedLinear:
    """W[r, c] ~ output_scale[r] * codebook[codes[r, c]] * input_scale[c], and a bias.

    codes         uint8 [out, in]
    codebook      float32 [2**bits], strictly ascending
    input_scale   float32 [in], positive
    output_scale  float32 [out], positive here; a checkpoint made elsewhere may have negative ones
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
        weight = self.codebook[self.codes.int()]
        return weight.mul_(self.output_scale[:, None]).mul_(self.input_scale)
