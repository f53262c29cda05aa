"""The form in which packages hold a weight: codes into a codebook, or the integers themselves, and scales.

Nothing here depends on a back end, so whoever plans, writes or checks packages reads it here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anequant.errors import UnsupportedError, VerificationError
from anequant.quantization.codebook import codebook_step, make_uniform_codebook
from anequant.quantization.linear import QuantizedLinear

Array = np.ndarray[Any, Any]
INTEGER_WIDTHS = (4, 8)


@dataclass(frozen=True)
class CompressedWeight:
    """A constant that is codes into a codebook, integers, or either of them times scales.

    codes     uint8, or where there is no codebook, the integers
    codebook  (.., entries, width) in its own type, or None
    scale     one for each block of codes, or None
    place     of the codes in the weight file, or None where they are so few that the model file holds them
    """

    codes: Array
    codebook: Array | None
    scale: Array | None
    place: int | None

    def has_tables_of(self, other: CompressedWeight) -> bool:
        """Tell whether the same codes mean the same in both."""
        tables = ((self.codebook, other.codebook), (self.scale, other.scale))
        return all(np.array_equal(a, b) if a is not None and b is not None else a is b for a, b in tables)


def stores_integers(quantized: QuantizedLinear, *, rounded: bool) -> bool:
    """Tell whether a package holds the integers themselves of a linear whose input is `rounded` or not: those
    of 8 bits that rounded inputs meet, and all integers of 4 or 8 bits that have scales of groups."""
    if rounded or quantized.output_scale.ndim == 1:
        return rounded and quantized.bits == 8
    uniform = quantized.bits in INTEGER_WIDTHS
    return uniform and torch.equal(quantized.codebook, make_uniform_codebook(quantized.bits))


def look_up_integers(quantized: QuantizedLinear, name: str, *, rounded: bool) -> Tensor | None:
    """Return the integers int8 [out, in] that a package holds, None where it holds codes; raises as
    `split_codebook`."""
    if not stores_integers(quantized, rounded=rounded):
        return None
    entries = quantized.codebook.to(torch.int8)
    if rounded:
        entries, _ = split_codebook(quantized.codebook, name)
    return entries[quantized.codes.int()]


def split_codebook(codebook: Tensor, name: str) -> tuple[Tensor, float]:
    """Return a codebook as int8 [K], and the power of two that multiplies it.

    Raises UnsupportedError, naming the linear, when it is not integers from -128 to 127 times one.
    """
    step = codebook_step(codebook)
    entries = codebook.double() / step
    exact = torch.equal(entries, entries.round()) and float(np.float16(step)) == step
    if not exact:
        raise UnsupportedError(
            f"the codebook of '{name}' is not 8-bit integers times a power of two, as rounded inputs need",
            remedy="quantize the float model with activation_scales = 'static'",
        )
    return entries.to(torch.int8), step


def take_rows(quantized: QuantizedLinear, rows: slice) -> QuantizedLinear:
    """Return some rows of a linear, with the whole codebook."""
    bias = None if quantized.bias is None else quantized.bias[rows]
    return replace(
        quantized, codes=quantized.codes[rows], output_scale=quantized.output_scale[rows], bias=bias
    )


def check_weight(
    value: str, weight: CompressedWeight, expected: QuantizedLinear, where: str, *, rounded: bool
) -> None:
    """Compare the constant `value` with the checkpoint's linear; `rounded` says that its input is.

    Raises VerificationError unless the codes are equal, and codebook and scales are equal but for the power
    of two that headroom may have moved.
    """
    codes, codebook = expected.codes.numpy(), expected.codebook.double().numpy()
    stored, used = weight.codes.reshape(codes.shape), np.unique(codes)
    if weight.codebook is not None:
        same, entries = np.array_equal(stored, codes), weight.codebook.reshape(-1)
    else:
        entries = np.zeros(len(codebook), stored.dtype)
        entries[codes] = stored
        same = np.array_equal(entries[codes], stored)
    if not same:
        raise VerificationError(f"the codes of '{value}' are not the checkpoint's", where=where)
    scale = np.ones(1) if weight.scale is None else weight.scale.astype(np.float64)
    grouped = expected.output_scale.ndim == 2
    if grouped:
        scales = expected.output_scale.double().numpy()
        same = scale.size == scales.size and _equal_but_for_a_power(scale.reshape(scales.shape), scales)
    else:
        same = scale.size == 1 and (weight.scale is not None) == rounded
    if not same:
        raise VerificationError(f"'{value}' has not the checkpoint's scales", where=where)
    table = entries.astype(np.float64) * (1 if grouped else float(scale.reshape(-1)[0]))
    integers = entries.dtype == np.int8
    if not _equal_but_for_a_power(table[used], codebook[used]) or (rounded and not integers):
        raise VerificationError(f"'{value}' has not the checkpoint's one codebook", where=where)


def _equal_but_for_a_power(stored: Array, expected: Array) -> bool:
    """Tell whether one power of two makes `stored` equal to `expected`; float64."""
    if stored.shape != expected.shape:
        return False
    ends = [float(np.abs(values).max()) for values in (stored, expected)]
    power = np.frexp(ends[1])[1] - np.frexp(ends[0])[1]
    return np.array_equal(np.ldexp(stored, power), expected)
