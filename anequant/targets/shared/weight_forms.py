"""In which form a package holds a weight, without coremltools, for whoever plans its size."""

from __future__ import annotations

import torch

from anequant.quantization.codebook import make_uniform_codebook
from anequant.quantization.linear import QuantizedLinear

INTEGER_WIDTHS = (4, 8)


def stores_integers(quantized: QuantizedLinear, *, rounded: bool) -> bool:
    """Whether a package holds the integers themselves of a linear whose input is `rounded` or not: those of
    8 bits that rounded inputs meet, and all integers of 4 or 8 bits that have scales of groups."""
    if rounded or quantized.output_scale.ndim == 1:
        return rounded and quantized.bits == 8
    uniform = quantized.bits in INTEGER_WIDTHS
    return uniform and torch.equal(quantized.codebook, make_uniform_codebook(quantized.bits))
