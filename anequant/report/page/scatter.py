"""Where the dots of a scatter chart go, and the labels beside them; in the units of its viewBox."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anequant.report.page.charts import (
    BOTTOM,
    LOGARITHMIC,
    RIGHT,
    TOP,
    WIDTH,
    Tick,
    place_even_ticks,
    place_power_ticks,
    share_of,
)

HEIGHT, LEFT = 250, 52
CHARACTER, LINE = 6.5, 11.0
"""Width of a label's character and height of its line."""

PLACES = ((8, 4, "start"), (-8, 4, "end"), (0, -8, "middle"), (0, 17, "middle"))
"""Where the end, middle or start of a label's baseline goes from its dot, the best first."""

MARK = 5.0
INSET = 14.0
"""Room at both ends of the x axis, so that no dot is on the edge."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """`kind` chooses the mark; a line joins the points of the `front`."""

    label: str
    kind: str
    at: tuple[float, float]
    front: bool


@dataclass(frozen=True)
class Dot:
    point: Point
    x: float
    y: float
    label_x: float
    label_y: float
    anchor: str


@dataclass(frozen=True)
class Scatter:
    """`path` joins the dots of the front, from left to right."""

    dots: tuple[Dot, ...]
    path: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def draw_scatter(points: Sequence[Point]) -> Scatter | None:
    """Place dots and labels; None without points. The y axis counts powers where its values differ much and
    are positive, else it starts at 0 or below."""
    if not points:
        return None
    across, up = zip(*(point.at for point in points), strict=True)
    powers = min(up) > 0 and max(up) / min(up) > LOGARITHMIC
    x_ticks = place_even_ticks(min(across), max(across))
    y_ticks = place_power_ticks(min(up), max(up)) if powers else place_even_ticks(min(*up, 0.0), max(up))
    left, right = min(x_ticks[0], *across), max(x_ticks[-1], *across)
    low, high = min(y_ticks[0], *up), max(y_ticks[-1], *up)

    def x(value: float) -> float:
        share = share_of(value, left, right, powers=False)
        return round(LEFT + INSET + share * (WIDTH - LEFT - RIGHT - 2 * INSET), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - share_of(value, low, high, powers=powers) * (HEIGHT - TOP - BOTTOM), 1)

    places = [(x(point.at[0]), y(point.at[1])) for point in points]
    taken: list[Box] = [(at - MARK, up - MARK, at + MARK, up + MARK) for at, up in places]
    dots = []
    for point, place in zip(points, places, strict=True):
        (label_x, label_y, anchor), box = _place_label(point.label, place, taken)
        taken.append(box)
        dots.append(Dot(point, *place, label_x, label_y, anchor))
    front = sorted((dot.x, dot.y) for dot in dots if dot.point.front)
    path = "".join(f"{'L' if number else 'M'}{at:g} {up:g}" for number, (at, up) in enumerate(front))
    return Scatter(
        tuple(dots),
        path,
        tuple(Tick(x(value), f"{value:.6g}") for value in x_ticks),
        tuple(Tick(y(value), f"{value:.6g}") for value in y_ticks),
    )


def _place_label(
    text: str, dot: tuple[float, float], taken: Sequence[Box]
) -> tuple[tuple[float, float, str], Box]:
    """Return the first place where nothing is yet, or the first of all, and the box that a label takes
    there."""
    places = [(dot[0] + right, dot[1] + down, anchor) for right, down, anchor in PLACES]
    options = [(place, _box(text, *place)) for place in places]
    free = (option for option in options if not any(_overlap(option[1], other) for other in taken))
    return next(free, options[0])


def _box(text: str, x: float, y: float, anchor: str) -> Box:
    width = CHARACTER * len(text)
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return left, y - LINE + 2, left + width, y + 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
