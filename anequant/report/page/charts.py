"""Where the marks of a report's charts go, in the units of their viewBox; the template draws them.

Nothing is told by colour alone: cells hold their numbers, lines differ in dashes and markers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VIRIDIS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
"""Even steps of matplotlib's viridis (Smith and van der Walt 2015): ever lighter, also in grey."""

CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH, HEAD_HEIGHT = 46, 24, 34, 24
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 180, 42, 8, 10, 30
LOGARITHMIC = 15.0
"""Ratio of the largest to the smallest value from which an axis counts powers of ten."""

MOST_MARKERS = 40
CODES_WIDTH, CODES_HEIGHT = 96, 24

Values = Sequence[float | None]


@dataclass(frozen=True)
class Cell:
    """`value` is None where there is none to show; `ink` is black or white, whichever reads better."""

    x: int
    y: int
    value: float | None
    fill: str
    ink: str


@dataclass(frozen=True)
class HeatMap:
    width: int
    height: int
    cells: tuple[Cell, ...]
    low: float
    high: float


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """`points` are those that have a value; `path` joins them."""

    kind: str
    points: tuple[tuple[float, float], ...]
    path: str


@dataclass(frozen=True)
class LineChart:
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    markers: bool


def draw_heat_map(rows: Sequence[Values]) -> HeatMap | None:
    """Place the cells of rows of the same length; None where there is no value."""
    known = [value for row in rows for value in row if value is not None]
    if not known:
        return None
    low, high = min(known), max(known)
    cells = []
    for number, row in enumerate(rows):
        for column, value in enumerate(row):
            x, y = LABEL_WIDTH + column * CELL_WIDTH, HEAD_HEIGHT + number * CELL_HEIGHT
            share = 0.0 if value is None or high == low else (value - low) / (high - low)
            fill = viridis(share)
            cells.append(Cell(x, y, value, fill, readable_ink(fill)))
    width, height = LABEL_WIDTH + CELL_WIDTH * len(rows[0]), HEAD_HEIGHT + CELL_HEIGHT * len(rows)
    return HeatMap(width, height, tuple(cells), low, high)


def viridis(share: float) -> str:
    """Return the colour of a share from 0 to 1, as #rrggbb."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    step = min(int(place), len(VIRIDIS) - 2)
    one, other = (_channels(VIRIDIS[step + more]) for more in (0, 1))
    mixed = (round(a + (b - a) * (place - step)) for a, b in zip(one, other, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def readable_ink(fill: str) -> str:
    """Return black or white, whichever has the larger contrast; it is never less than 4.5."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, fill))


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours #rrggbb (WCAG 2.2, "contrast ratio")."""
    darker, lighter = sorted(_luminance(color) for color in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def draw_line_chart(series: Mapping[str, Values], *, percent: bool = False) -> LineChart | None:
    """Place lines by kind over the same places 0, 1, 2, ...; None where there is no value.

    The y axis counts powers where values differ much and are positive; a value that is missing leaves a gap.
    With `percent` values are shares: it starts at 0 and is labelled in percent.
    """
    known = [value for values in series.values() for value in values if value is not None]
    if not known:
        return None
    count = max(len(values) for values in series.values())
    low, high = min(known), max(known)
    powers = low > 0 and high / low > LOGARITHMIC
    ticks = (
        place_power_ticks(low, high)
        if powers
        else place_even_ticks(min(low, 0.0) if percent or low < high / 2 else low, high)
    )
    bottom, top = (min(ticks[0], low), max(ticks[-1], high))

    def y(value: float) -> float:
        share = share_of(value, bottom, top, powers=powers)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def x(place: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (place / (count - 1) if count > 1 else 0.5), 1)

    step = max(1, math.ceil((count - 1) / 8))
    return LineChart(
        tuple(
            _line(kind, [(x(i), y(v)) if v is not None else None for i, v in enumerate(values)])
            for kind, values in series.items()
        ),
        tuple(Tick(x(place), str(place)) for place in range(0, count, step)),
        tuple(Tick(y(value), label) for value, label in zip(ticks, _labels(ticks, percent), strict=True)),
        count <= MOST_MARKERS,
    )


def _labels(ticks: Sequence[float], percent: bool) -> list[str]:
    """Return each tick's number, with as many digits as it takes to tell them apart."""
    factor, sign = (100, "%") if percent else (1, "")
    for digits in range(6, 18):
        labels = [f"{factor * value:.{digits}g}{sign}" for value in ticks]
        if len(set(labels)) == len(ticks):
            break
    return labels


def draw_code_bars(counts: Sequence[int]) -> str:
    """Return a path of one bar for every code, as high as it is often used, in CODES_WIDTH x CODES_HEIGHT."""
    wide, most = CODES_WIDTH / len(counts), max(*counts, 1)
    gap = wide / 5 if len(counts) <= 32 else 0.0
    bars = []
    for place, count in enumerate(counts):
        high = CODES_HEIGHT * count / most
        bars.append(f"M{place * wide:.4g} {CODES_HEIGHT}v{-high:.3g}h{wide - gap:.4g}v{high:.3g}z")
    return "".join(bars)


def entropy(counts: Sequence[int]) -> float:
    """Return the bits that a code carries on average: its width when all codes are used alike."""
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts if count)


def _line(kind: str, places: Sequence[tuple[float, float] | None]) -> Line:
    path, joined = "", False
    for place in places:
        if place is not None:
            path += f"{'L' if joined else 'M'}{place[0]:g} {place[1]:g}"
        joined = place is not None
    return Line(kind, tuple(place for place in places if place is not None), path)


def share_of(value: float, low: float, high: float, *, powers: bool) -> float:
    """Return how far a value is from one end of an axis to the other; one half on an axis without length."""
    ends = [math.log(part) if powers else part for part in (low, value, high)]
    return (ends[1] - ends[0]) / (ends[2] - ends[0]) if ends[2] > ends[0] else 0.5


def place_even_ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers that span the values."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def place_power_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten that span the values, with 2 and 5 between them where they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1.0,) if last - first > 2 else (1.0, 2.0, 5.0)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    below = [tick for tick in ticks if tick <= low]
    above = [tick for tick in ticks if tick >= high]
    return [tick for tick in ticks if below[-1] <= tick <= above[0]]


def _channels(color: str) -> tuple[int, int, int]:
    digits = color.removeprefix("#")
    return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)


def _luminance(color: str) -> float:
    shares = [channel / 255 for channel in _channels(color)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
