"""One tensor's statistics, its histogram and its codes, as rows of (label, text)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from anequant.evaluation.distribution import Distribution
from anequant.inspection.inspect import CodeUse, TensorFacts
from anequant.report.terminal.inspected import Rows, shape_words

BAR = 24
"""Characters of the longest bar of a histogram."""


def tensor_rows(facts: TensorFacts) -> Rows:
    """Statistics of one tensor, its histogram, and its codes."""
    own = facts.distribution
    rows: Rows = [
        ("tensor", facts.name),
        ("in", facts.place),
        ("dtype", facts.dtype),
        ("shape", shape_words(facts.shape)),
    ]
    if own.not_finite:
        rows.append(("not finite", f"{own.not_finite} values, left out below"))
    for label, value in (
        ("min", own.low),
        ("max", own.high),
        ("mean", own.mean),
        ("std", own.std),
        ("rms", own.rms),
        ("max/rms", own.peak),
    ):
        rows.append((label, "none" if value is None else f"{value:.6g}"))
    rows.append(("kurtosis", "none" if own.kurtosis is None else f"{own.kurtosis:.3f} (normal values: 3)"))
    rows.append(("zeros", "none" if own.zeros is None else f"{own.zeros:.2%}"))
    rows += _histogram(own)
    if facts.codes is not None:
        rows += _codes(facts.codes)
    elif facts.tables:
        rows.append(("tables", f"{facts.tables} lookup tables"))
    return rows


def _histogram(own: Distribution) -> Rows:
    """A bar for each bin, as long as its share of the fullest."""
    if own.low is None or own.high is None:
        return []
    if own.low == own.high:
        return [("histogram", f"all values are {own.low:.6g}")]
    step = (own.high - own.low) / len(own.counts)
    rows: Rows = [("histogram", f"from {own.low:.4g} to {own.high:.4g}, bins {step:.3g} wide")]
    for number, count in enumerate(own.counts):
        start = own.low + number * step
        rows.append(("", f"{start:>10.3g} {count:>9}  {_bar(count, max(own.counts))}"))
    return rows


def _codes(codes: Sequence[CodeUse]) -> Rows:
    total, most = sum(use.count for use in codes), max(use.count for use in codes)
    used = sum(use.count > 0 for use in codes)
    rows: Rows = [("codebook", f"{len(codes)} entries, {used} of them used")]
    for use in codes:
        share = f"{use.count / total:6.2%}" if total else ""
        rows.append(("", f"{use.entry:>10.4g} {share:>9}  {_bar(use.count, most)}"))
    return rows


def _bar(count: int, most: int) -> str:
    """At least one mark for what is not zero."""
    return "#" * math.ceil(BAR * count / most) if most else ""
