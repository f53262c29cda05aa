"""Codebooks: the integers, or free entries fitted by Lloyd-Max.

Lloyd-Max (Lloyd 1982, Max 1960) alternates two optimality conditions of a scalar quantizer: boundaries
lie midway between entries, and each entry is the mean of its cell. In one dimension both are exact on a
histogram with prefix sums: a cell's mean is a difference of two prefix sums, so one round costs
O(K log bins) whatever the tensor's size. The start is the Panter-Dite companding (1951): for small
cells the best density of entries is proportional to the cube root of the values' density.
"""

from __future__ import annotations

import torch
from torch import Tensor

LLOYD_ROUNDS = 300
LLOYD_TOLERANCE = 1e-7
CHUNK = 1 << 22
RELATIVE_GAP = 2.0**-8
ABSOLUTE_GAP = 2.0**-10


def uniform_codebook(bits: int) -> Tensor:
    """The integers -2**(bits-1) ... 2**(bits-1) - 1, float32."""
    half = 2 ** (bits - 1)
    return torch.arange(-half, half, dtype=torch.float32)


def best_uniform_step(core: Tensor, bits: int) -> float:
    """The step of the integer grid with the least squared error on `core`, by a line search.

    Searches 0.3 to 1.5 of the step that is best for a Gaussian of the core's root mean square, on the
    histogram of the values.
    """
    centres, counts = _histogram(core, bits)
    rms = float((counts @ centres.square() / counts.sum()).sqrt())
    if rms == 0.0:
        return 1.0
    gaussian_step = rms * {2: 1.0, 3: 0.59, 4: 0.335, 6: 0.104, 8: 0.031}[bits]
    half = 2 ** (bits - 1)

    def error(step: float) -> float:
        rounded = (centres / step).round().clamp(-half, half - 1) * step
        return float(counts @ (centres - rounded).square())

    candidates = [gaussian_step * (0.3 + 0.02 * k) for k in range(61)]
    return min(candidates, key=error)


def lloyd_max(core: Tensor, bits: int) -> Tensor:
    """The codebook of 2**bits entries with the least squared error on `core`: float32, ascending.

    Entries are float16 numbers, far enough apart (a 256th of their size) that a reader that divides
    the weight by its scales in float16 still finds the right one.
    """
    centres, counts = _histogram(core, bits)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), counts.cumsum(0)])
    moment = torch.cat([torch.zeros(1, dtype=torch.float64), (counts * centres).cumsum(0)])
    entries = _companding_start(centres, counts, 2**bits)
    for _ in range(LLOYD_ROUNDS):
        edges = torch.searchsorted(centres, (entries[1:] + entries[:-1]) / 2)
        low = torch.cat([edges.new_zeros(1), edges])
        high = torch.cat([edges, edges.new_full((1,), centres.numel())])
        weight = mass[high] - mass[low]
        moved = torch.where(weight > 0, (moment[high] - moment[low]) / weight.clamp_min(1e-300), entries)
        shift = float((moved - entries).abs().max())
        entries = moved
        if shift <= LLOYD_TOLERANCE * float(centres[-1] - centres[0]):
            break
    return _separate(entries)


def nearest_codes(core: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest entry for every value: uint8, shape of `core`. Works in bounded memory."""
    boundaries = (codebook[1:] + codebook[:-1]) / 2
    codes = torch.empty(core.shape, dtype=torch.uint8)
    flat_codes, flat_core = codes.view(-1), core.reshape(-1)
    for start in range(0, flat_core.numel(), CHUNK):
        part = flat_core[start : start + CHUNK]
        flat_codes[start : start + CHUNK] = torch.bucketize(part, boundaries, out_int32=True)
    return codes


def _histogram(core: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Bin centres and counts, float64; 64k bins for 8 bits, 16k below."""
    bins = 65536 if bits > 6 else 16384
    values = core.reshape(-1)
    low, high = float(values.min()), float(values.max())
    if low == high:
        high = low + max(abs(low), 1.0) * 1e-3
    counts = torch.zeros(bins, dtype=torch.float64)
    for start in range(0, values.numel(), CHUNK):
        counts += torch.histc(values[start : start + CHUNK], bins=bins, min=low, max=high).double()
    width = (high - low) / bins
    return low + width * (torch.arange(bins, dtype=torch.float64) + 0.5), counts


def _companding_start(centres: Tensor, counts: Tensor, size: int) -> Tensor:
    smooth = torch.nn.functional.avg_pool1d(
        counts[None, None], kernel_size=65, stride=1, padding=32, count_include_pad=False
    )[0, 0]
    distribution = smooth.pow(1 / 3).cumsum(0)
    targets = (torch.arange(size, dtype=torch.float64) + 0.5) / size * distribution[-1]
    return centres[torch.searchsorted(distribution, targets).clamp_max(centres.numel() - 1)]


def _separate(entries: Tensor) -> Tensor:
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
