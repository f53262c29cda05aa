"""Codebooks: the integers, or free entries fitted by Lloyd-Max.

Lloyd-Max (Lloyd 1982, Max 1960) alternates two optimality conditions of a scalar quantizer: boundaries
lie midway between entries, and each entry is the mean of its cell. In one dimension both are exact on a
histogram with prefix sums: a cell's mean is a difference of two prefix sums, so one round costs
O(K log bins) whatever the tensor's size. The start is the Panter-Dite companding (1951): for small
cells the best density of entries is proportional to the cube root of the values' density.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anequant.quantization.codebook_kernels import count_values, find_nearest_entries, run_lloyd_rounds

STEPS = 100
LLOYD_ROUNDS = 300
LLOYD_TOLERANCE = 1e-7
MOST_MOVES = 64
LEAST_GAIN = 1e-4
RELATIVE_GAP = 2.0**-8
ABSOLUTE_GAP = 2.0**-10


def make_uniform_codebook(bits: int) -> Tensor:
    """Return the integers -2**(bits-1) ... 2**(bits-1) - 1, float32."""
    half = 2 ** (bits - 1)
    return torch.arange(-half, half, dtype=torch.float32)


def count_code_bits(entries: int) -> int:
    """Return the width of a code that chooses from so many entries."""
    return (entries - 1).bit_length()


def find_uniform_step(core: Tensor, bits: int) -> float:
    """Return the step of the integer grid with the least squared error on `core`, by a line search.

    Searches from rms / 2**bits, a quarter or less of what is best for a Gaussian, up to the step that
    clips nothing, on the histogram of the values.
    """
    centres, counts = _histogram(core, bits)
    rms = float((counts @ centres.square() / counts.sum()).sqrt())
    if rms == 0.0:
        return 1.0
    half = 2 ** (bits - 1)
    low = rms * 2.0**-bits
    high = max(float(centres.abs().max()) / (half - 1), low)

    def error(step: float) -> float:
        rounded = (centres / step).round().clamp(-half, half - 1) * step
        return float(counts @ (centres - rounded).square())

    for _ in range(2):
        steps: list[float] = torch.logspace(math.log10(low), math.log10(high), STEPS).tolist()
        best = min(range(STEPS), key=lambda k: error(steps[k]))
        low, high = steps[max(best - 1, 0)], steps[min(best + 1, STEPS - 1)]
    return steps[best]


def lloyd_max(core: Tensor, bits: int) -> Tensor:
    """Return the codebook of 2**bits entries with the least squared error on `core`: float32, ascending.

    Entries are float16 numbers, far enough apart (a 256th of their size) that a reader that divides
    the weight by its scales in float16 still finds the right one.
    """
    cells = _Cells(*_histogram(core, bits))
    entries, error = cells.lloyd(cells.companding_start(2**bits))
    for _ in range(MOST_MOVES):
        moved, lower = cells.lloyd(cells.move_one(entries))
        if lower >= error * (1 - LEAST_GAIN):
            break
        entries, error = moved, lower
    return separate(entries)


class _Cells:
    """A histogram, float64 [bins], with the prefix sums that give any cell's mean and squared error."""

    def __init__(self, centres: Tensor, counts: Tensor) -> None:
        self._centres, self._counts = centres, counts
        self._sums = torch.zeros(3, centres.numel() + 1, dtype=torch.float64)
        powers = torch.stack([counts, counts * centres, counts * centres.square()])
        torch.cumsum(powers, dim=1, out=self._sums[:, 1:])

    def companding_start(self, size: int) -> Tensor:
        """Return entries spaced by the cube root of the density, smoothed over a 64th of the range."""
        width = self._centres.numel() // 64 | 1
        smooth = torch.nn.functional.avg_pool1d(
            self._counts[None, None], width, stride=1, padding=width // 2, count_include_pad=False
        )
        distribution = smooth[0, 0].pow(1 / 3).cumsum(0)
        targets = (torch.arange(size, dtype=torch.float64) + 0.5) / size * distribution[-1]
        return self._centres[torch.searchsorted(distribution, targets).clamp_max(self._centres.numel() - 1)]

    def lloyd(self, entries: Tensor) -> tuple[Tensor, float]:
        """Alternate boundaries and means until they rest: the entries and their squared error."""
        tolerance = LLOYD_TOLERANCE * float(self._centres[-1] - self._centres[0])
        entries = run_lloyd_rounds(entries, self._centres, self._sums, LLOYD_ROUNDS, tolerance)
        edges = self._edges(entries)
        return entries, float(self._error(edges[:-1], edges[1:]).sum())

    def move_one(self, entries: Tensor) -> Tensor:
        """Take the entry that is cheapest to merge with its neighbour to the cell where it helps most.

        Lloyd's rounds alone cannot do this: they stop at a local optimum (Patane and Russo 2001).
        """
        edges = self._edges(entries)
        own = self._error(edges[:-1], edges[1:])
        merge_cost = self._error(edges[:-2], edges[2:]) - own[:-1] - own[1:]
        inside = torch.searchsorted(self._centres, entries).clamp(edges[:-1], edges[1:])
        split_gain = own - self._error(edges[:-1], inside) - self._error(inside, edges[1:])
        merged, split = int(merge_cost.argmin()), int(split_gain.argmax())
        if split in (merged, merged + 1):
            return entries
        ends = torch.stack([edges[split], inside[split], edges[split + 1]])
        halves = self._means(ends[:-1], ends[1:])
        together = self._means(edges[merged : merged + 1], edges[merged + 2 : merged + 3])
        kept = [k for k in range(entries.numel()) if k not in (merged, merged + 1, split)]
        return torch.cat([entries[kept], halves, together]).sort().values

    def _edges(self, entries: Tensor) -> Tensor:
        """Return bin numbers at which the cells of ascending entries begin and end: [K + 1]."""
        inner = torch.searchsorted(self._centres, (entries[1:] + entries[:-1]) / 2)
        return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), self._centres.numel())])

    def _between(self, low: Tensor, high: Tensor) -> Tensor:
        sums: Tensor = self._sums[:, high] - self._sums[:, low]
        return sums

    def _means(self, low: Tensor, high: Tensor) -> Tensor:
        weight, moment, _ = self._between(low, high)
        means: Tensor = torch.where(weight > 0, moment / weight.clamp_min(1e-300), self._centres[low])
        return means

    def _error(self, low: Tensor, high: Tensor) -> Tensor:
        weight, moment, square = self._between(low, high)
        errors: Tensor = (square - moment.square() / weight.clamp_min(1e-300)).clamp_min(0)
        return errors


def find_nearest_codes(core: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest entry for every value: uint8, shape of `core`."""
    return find_nearest_entries(core.reshape(-1), codebook).view(core.shape)


def _histogram(core: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return bin centres and counts, float64; 64k bins for 8 bits, 16k below."""
    bins = 65536 if bits > 6 else 16384
    values = core.reshape(-1)
    low, high = float(values.min()), float(values.max())
    if low == high:
        high = low + max(abs(low), 1.0) * 1e-3
    width = (high - low) / bins
    centres = low + width * (torch.arange(bins, dtype=torch.float64) + 0.5)
    return centres, count_values(values, bins, low, high)


def round_to_integers(codebook: Tensor) -> Tensor:
    """codebook [K] as multiples from -128 to 127 of one power of two, still ascending.

    What an int8 machine can hold; see `codebook_step`. At 4 bits it costs 0.4% more squared error; at 8 bits
    only the integers themselves, times a power of two, fit.
    """
    step = codebook_step(codebook)
    values = (codebook.double() / step).round().tolist()
    middle = min(range(len(values)), key=lambda k: abs(values[k]))
    for k in range(middle + 1, len(values)):
        values[k] = max(values[k], values[k - 1] + 1)
    for k in range(middle - 1, -1, -1):
        values[k] = min(values[k], values[k + 1] - 1)
    return torch.tensor(values, dtype=torch.float32) * step


def codebook_step(codebook: Tensor) -> float:
    """Return the least power of two of which all entries are between -128 and 127 times."""
    low, high = (float(end) for end in codebook.aminmax())
    return 2.0 ** math.ceil(math.log2(max(high / 127, low / -128)))


def separate(entries: Tensor) -> Tensor:
    """Round to float16 and push entries that are too close outward from the one nearest zero."""
    values = entries.sort().values.half().double().tolist()
    middle = min(range(len(values)), key=lambda k: abs(values[k]))
    for sign, order in ((1, range(middle + 1, len(values))), (-1, range(middle - 1, -1, -1))):
        for k in order:
            inner = sign * values[k - sign]
            needed = inner + max(RELATIVE_GAP * abs(inner), ABSOLUTE_GAP)
            if sign * values[k] < needed:
                values[k] = sign * float(torch.tensor(needed * (1 + 2.0**-11) + 2.0**-15).half())
    return torch.tensor(values, dtype=torch.float32)
