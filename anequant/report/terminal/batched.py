"""What became of a batch, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from anequant.comparison.batch import Row
from anequant.report.page.html import NOTHING
from anequant.units import format_bytes

COLUMNS = ("job", "recipe", "model", "bits/weight", "size", "NLL", "KL", "seconds", "state")


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each job, in the order of COLUMNS."""
    return [_line(row) for row in rows]


def _line(row: Row) -> tuple[str, ...]:
    quality = row.quality or {}
    return (
        row.name,
        row.recipe,
        row.model,
        NOTHING if row.bits is None else f"{row.bits.whole:.2f}",
        NOTHING if row.bits is None else format_bytes(row.bits.nbytes),
        *(f"{quality[key]:.4f}" if key in quality else NOTHING for key in ("nll", "kl")),
        NOTHING if row.seconds is None else f"{row.seconds:.1f}",
        row.state,
    )


def failures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Why jobs failed, as rows of (label, text)."""
    return [("failed", f"{row.name}: {row.failed}") for row in rows if row.failed]
