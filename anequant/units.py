"""Bytes and seconds as people read and write them; megabytes are millions of bytes."""

from __future__ import annotations

import re

NOTHING = "–"
"""Stands for a number that is not known."""

SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>([KMG]I?)?)B?", re.IGNORECASE)


def format_bytes(count: float | None) -> str:
    """Return three digits and the largest unit that fits: 12 bytes, 1.23 kB, 45.6 MB, 1,234 GB; NOTHING for
    None."""
    if count is None:
        return NOTHING
    for size, unit in SIZES:
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} bytes"


def parse_bytes(text: str) -> int:
    """Read 4GB, 512MiB or a plain number. Raises ValueError for anything else, OverflowError for infinitely
    many."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"'{text}' is no size such as 4GB or 512MiB")
    return int(float(found["number"]) * FACTORS[found["unit"].upper()])


def format_duration(seconds: float) -> str:
    """Return what was measured: 1.2 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_estimate(seconds: float) -> str:
    """Return what is expected, which is known to minutes at best: 1.2 s, 3 min, 1 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_time_left(seconds: float | None) -> str:
    """Return "about 3 min left", no more precise than such an estimate is, or that it is being estimated."""
    if seconds is None:
        return "estimating"
    if seconds < 60:
        return f"about {max(5, 5 * round(seconds / 5))} s left"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min left"
    hours, minutes = divmod(5 * round(seconds / 300), 60)
    return f"about {hours} h {minutes:02} min left"


def format_short_duration(seconds: float) -> str:
    """Return the time of a unit of work in few characters: 12.3 s, 0:02:03."""
    return f"{seconds:.1f} s" if seconds < 100 else format_clock(seconds)


def format_clock(seconds: float) -> str:
    """Return hours, minutes and seconds: 0:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def format_memory(count: int) -> str:
    """Return what a process holds, to the megabyte: 4567 MB, 12.3 GB."""
    return f"{count / 1e6:.0f} MB" if count < 1e10 else f"{count / 1e9:.1f} GB"
