"""Rounding methods: how a scaled weight becomes codes. A new method is one function in ROUNDINGS."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from anequant.quantization.codebook import nearest_codes

Rounding = Callable[[Tensor, Tensor], Tensor]
"""(core float32 [out, in], codebook float32 [K]) -> codes uint8 [out, in]"""

ROUNDINGS: dict[str, Rounding] = {"nearest": nearest_codes}
