"""Codebooks of per-tensor checkpoints that others wrote: absent, unsorted, or of an odd length.

A weight stored as input_scale * entry * output_scale takes, divided by both scales in float16, a few values
only, each blurred by the rounding of the stored product and of the division. Values closer together than
that rounding can tell are one entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anequant.errors import InputError
from anequant.recipe import WIDTHS

BLUR = 2.0**-8
"""Relative, for a weight stored in bfloat16; float16 is eight times finer."""

MOST_ENTRIES = 256
ROWS = 1024


def find_codebook(name: str, weight: Tensor, input_scales: Tensor, output_scales: Tensor) -> Tensor:
    """Return the entries that weight [out, in] was made from: float32, ascending, float16 numbers.

    Raises InputError naming the tensor when there are more than 256.
    """
    values = torch.empty(0)
    for start in range(0, weight.shape[0], ROWS):
        core = weight[start : start + ROWS].half() / (
            input_scales.half() * output_scales[start : start + ROWS].half()
        )
        values = torch.unique(torch.cat([values, torch.unique(core.float())]))
    edge = float(values.abs().max()) * BLUR**2
    starts = torch.ones(len(values), dtype=torch.bool)
    starts[1:] = values.diff() > BLUR * torch.maximum(values[1:].abs(), values[:-1].abs()) + edge
    group = starts.cumsum(0) - 1
    count = int(group[-1]) + 1
    if count > MOST_ENTRIES:
        raise InputError(
            f"'{name}.weight' divided by its scales takes {count} values, and there is no codebook",
            remedy="a per-tensor checkpoint has at most 256; quantize the float model",
        )
    sums = torch.zeros(count).index_add_(0, group, values)
    return complete_codebook(name, (sums / group.bincount()).half().float())


def count_stored_bits(entries: int) -> int:
    """Return the width of codes into a stored codebook of 2 to 256 entries, filled up to one of WIDTHS."""
    return min(bits for bits in WIDTHS if 2**bits >= entries)


def complete_codebook(name: str, entries: Tensor) -> Tensor:
    """Return a codebook of any order and length as an ascending one of 2**bits entries; what is added is not
    used.

    Raises InputError naming the tensor for too few or too many entries, or one that is not finite.
    """
    entries = torch.unique(entries.reshape(-1).float())
    if not (2 <= len(entries) <= MOST_ENTRIES and bool(entries.isfinite().all())):
        raise InputError(f"'{name}.codebook' must hold 2 to {MOST_ENTRIES} different finite entries")
    length = 2 ** count_stored_bits(len(entries))
    last, step = entries[-1], (entries[-1] - entries[0]).clamp_min(1e-3)
    return torch.cat([entries, last + step * torch.arange(1, length - len(entries) + 1)])
