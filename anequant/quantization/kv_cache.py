"""Rounding keys and values to a few bits: a scale and a lowest value per token and head.

Keys come after RoPE (and R3, which spreads their outlier channels); values come rotated by R2 already.
x ~ low + s q, q from 0 to 2^b - 1, with low and s as float16 numbers (KIVI, Liu et al. 2024, section 3, per
token; QuaRot, section 4). Rounding what was rounded changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedStates:
    """Keys or values of some tokens: codes uint8 [n, heads, tokens, head_dim] (two to a byte along
    head_dim at 4 bits), low and scale float16 [n, heads, tokens, 1]."""

    codes: Tensor
    low: Tensor
    scale: Tensor
    bits: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.low, self.scale))


def quantize_states(x: Tensor, bits: int) -> QuantizedStates:
    """Round x [n, heads, tokens, head_dim], head_dim even, to 8 or 4 bits."""
    low, high = torch.aminmax(x.float(), dim=-1, keepdim=True)
    low, levels = low.half(), 2**bits - 1
    scale = ((high - low.float()) / levels).clamp_min(torch.finfo(torch.float16).tiny).half()
    codes = ((x.float() - low.float()) / scale.float()).round_().clamp_(0, levels).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return QuantizedStates(codes, low, scale, bits)


def dequantize_states(states: QuantizedStates, dtype: torch.dtype) -> Tensor:
    """Return the numbers that `states` stand for: [n, heads, tokens, head_dim] in `dtype`."""
    codes = states.codes
    if states.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return (codes * states.scale.float() + states.low.float()).to(dtype)


def round_states(x: Tensor, bits: int) -> Tensor:
    """Return x as it comes back from the cache; gradients pass straight through."""
    with torch.no_grad():
        result = dequantize_states(quantize_states(x, bits), x.dtype)
    return x + (result - x).detach() if x.requires_grad else result
