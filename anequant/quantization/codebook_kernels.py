"""What codebooks need of every value of a tensor, compiled: a histogram, the rounds of Lloyd-Max on it, and
the nearest entries. Results are the same for any number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from anequant.quantization.kernels import TILE, compile_kernel, find_boundaries, find_nearest, run_on_threads


def count_values(values: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Count the values float32 [n] in each of so many equal bins from low to high: float64 [bins].

    Bins are half open, but for the last; no value lies beyond them.
    """
    flat, width = values.numpy(), np.float32(high) - np.float32(low)

    def count(begin: int, end: int) -> Any:
        counts = np.zeros(bins, np.int64)
        _count(flat[begin:end], np.float32(low), width, np.float32(bins), counts)
        return counts

    return torch.from_numpy(sum(run_on_threads(count, len(flat)))).double()


def run_lloyd_rounds(entries: Tensor, centres: Tensor, sums: Tensor, rounds: int, tolerance: float) -> Tensor:
    """Move ascending entries [K] to the means of their cells until none moves by more than `tolerance`.

    centres [bins] and sums [3, bins + 1], of which the first two rows are prefix sums of the weights and of
    the moments, are of a histogram. All are float64.
    """
    moved = entries.clone()
    _lloyd(moved.numpy(), centres.numpy(), sums.numpy(), rounds, tolerance)
    return moved


def find_nearest_entries(values: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest entry of codebook [K] for every value [n]: uint8 [n]."""
    flat, boundaries = values.numpy(), find_boundaries(codebook.numpy())
    codes = np.empty(len(flat), np.uint8)
    run_on_threads(lambda begin, end: _codes(flat[begin:end], boundaries, codes[begin:end]), len(flat))
    return torch.from_numpy(codes)


def look_up(table: Tensor, places: Tensor) -> Tensor:
    """Return table[places] for a table [K] and places of any shape, uint8 or uint16, below K."""
    values, flat = table.numpy(), places.reshape(-1).numpy()
    found = np.empty(len(flat), values.dtype)
    run_on_threads(lambda begin, end: _look_up(values, flat[begin:end], found[begin:end]), len(flat))
    return torch.from_numpy(found).view(places.shape)


@compile_kernel
def _look_up(table: Any, places: Any, found: Any) -> None:
    for number in range(len(places)):
        found[number] = table[places[number]]


@compile_kernel
def _count(values: Any, low: Any, width: Any, bins: Any, counts: Any) -> None:
    last, places = np.int32(len(counts) - 1), np.empty(TILE, np.int32)
    for start in range(0, len(values), TILE):
        count = min(TILE, len(values) - start)
        for row in range(count):
            places[row] = min(last, np.int32((values[start + row] - low) / width * bins))
        for row in range(count):
            counts[places[row]] += 1


@compile_kernel
def _lloyd(entries: Any, centres: Any, sums: Any, rounds: int, tolerance: float) -> None:
    last = len(entries) - 1
    for _ in range(rounds):
        shift, begin = 0.0, 0
        for k in range(last + 1):
            entry, end = entries[k], len(centres)
            if k < last:
                end = np.searchsorted(centres, (entries[k + 1] + entry) / 2)
            weight = sums[0, end] - sums[0, begin]
            if weight > 0:
                entries[k] = (sums[1, end] - sums[1, begin]) / weight
            shift = max(shift, abs(entries[k] - entry))
            begin = end
        if shift <= tolerance:
            break


@compile_kernel
def _codes(values: Any, boundaries: Any, codes: Any) -> None:
    chosen = np.empty(TILE, np.int32)
    for start in range(0, len(values), TILE):
        count = min(TILE, len(values) - start)
        find_nearest(values[start : start + count], count, boundaries, chosen)
        for row in range(count):
            codes[start + row] = chosen[row]
