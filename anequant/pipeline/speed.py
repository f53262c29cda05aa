"""How fast this machine is, measured for a moment, so that a plan's work becomes a time.

An estimate: products of large matrices run at the measured rate, everything else at the rate of going over
memory, and float64 at half the rate of float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from anequant.jobs.step import Speed

MEASURED = 0.2
"""Seconds that each of the two rates is measured for."""

SIDE, ELEMENTS = 1024, 1 << 24


def measure_speed() -> Speed:
    """Measure this machine with the threads that torch has, in about half a second."""
    matrix = torch.ones(SIDE, SIDE)
    values, target = torch.ones(ELEMENTS), torch.empty(ELEMENTS)
    return Speed(
        _measure_rate(lambda: torch.mm(matrix, matrix), 2 * SIDE**3),
        _measure_rate(lambda: torch.add(values, 1, out=target), 2 * 4 * ELEMENTS),
    )


def _measure_rate(run: Callable[[], object], amount: float) -> float:
    run()
    begun, count = time.monotonic(), 0
    while (elapsed := time.monotonic() - begun) < MEASURED:
        run()
        count += 1
    return count * amount / elapsed
