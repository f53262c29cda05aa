"""How several sources of calibration share its windows: by weights, and mixed evenly.

What is held out to judge by is the end of the windows in one place and their beginning in another, so the
windows of every source are spread over all of them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from anequant.errors import UsageError
from anequant.recipe import Calibration

WEIGHTED = re.compile(r"(.+)=([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)", re.DOTALL)

Word = str | Path
"""A source, as SOURCE or SOURCE=WEIGHT; a Path is a file's whole name."""


def make_calibration(
    words: Word | Sequence[Word], samples: int, length: int, seed: int, *, chat: bool
) -> Calibration:
    """Return the Calibration on one source, or on several in equal parts or by the weights that follow them.

    Raises UsageError for a source that is named twice, and what no Calibration may have.
    """
    listed = [words] if isinstance(words, str | Path) else list(words)
    pairs = [split_weight(word) for word in listed]
    named = [os.path.realpath(name) for name, _ in pairs]
    for number, name in enumerate(named):
        if name in named[:number]:
            raise UsageError(
                f"calibration source '{pairs[number][0]}' is named twice",
                remedy="give it a weight, as in a.txt=2",
            )
    return Calibration(
        tuple(name for name, _ in pairs), samples, length, seed, _simplify([w for _, w in pairs]), chat
    )


def split_weight(word: Word) -> tuple[str, float]:
    """Return the name and the weight of a source, 1 unless it ends in =NUMBER and is no file as a whole."""
    weighted = WEIGHTED.fullmatch(word) if isinstance(word, str) else None
    if weighted is None or os.path.exists(word):
        return str(word), 1.0
    return weighted[1], float(weighted[2])


def _simplify(weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights, none where all are 1."""
    return () if all(weight == 1 for weight in weights) else tuple(weights)


def count_shares(calibration: Calibration) -> tuple[int, ...]:
    """Return how many of the windows each source gives: the shares by weight, rounded by largest remainders,
    the first of equal ones first, and at least one."""
    weights = [Fraction(weight) for weight in calibration.weights] or [Fraction(1)] * len(calibration.sources)
    exact = [calibration.samples * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: calibration.samples - sum(counts)]:
        counts[number] += 1
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] = 1
    return tuple(counts)


def count_share(calibration: Calibration, source: str) -> int:
    """Return how many of the windows come from `source`: none where it is not one of the sources."""
    return dict(zip(calibration.sources, count_shares(calibration), strict=True)).get(source, 0)


def mix_evenly(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return (source, window) for all windows of sources that give so many each: window j of n stands where
    (j + 1/2) / n of the whole is over, the first source first of equals."""
    places = [
        (Fraction(2 * window + 1, 2 * count), source, window)
        for source, count in enumerate(counts)
        for window in range(count)
    ]
    return [(source, window) for _, source, window in sorted(places)]
