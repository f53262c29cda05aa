"""What is seen of a job while it runs: a line for every unit of work that is done, and how far the whole is.

On a terminal the lines stay and a bar below them moves. Anywhere else there are plain lines, at most one in a
while; then a line for a unit also says how far the job is. Nothing is seen of a job that is done at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from anequant.jobs.control import Expected, Unit
from anequant.jobs.estimate import Estimate
from anequant.units import format_clock, format_memory, format_short_duration, format_time_left

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

WIDEST = 100
"""Columns of a unit's line at most."""

WORTH_A_LINE = 1.0
"""Seconds of a unit that has a line although it is in no plan."""

UNITS_FOR_LINE = 10
"""A plain line for a unit waits so many times less than one for what is being done in it."""

BAR, NARROW_BAR, ROOMY = 24, 10, 90
"""Columns of the bar, in terminals with at least as many columns as `ROOMY` and in others."""

REFRESHES = 4
"""How often the bar is drawn anew, a second."""


class Display(Protocol):
    def plan(self, expected: Sequence[Expected]) -> None:
        """The units of the job that begins."""

    def report(self, parts: tuple[str, ...], done: float) -> None:
        """What is being done, from the whole to its part, and the share done of the job."""

    def finished(self, unit: Unit) -> None:
        """A unit is done."""


class Nothing:
    """Shows nothing."""

    def plan(self, expected: Sequence[Expected]) -> None: ...

    def report(self, parts: tuple[str, ...], done: float) -> None: ...

    def finished(self, unit: Unit) -> None: ...


class Lines:
    """Plain lines, which `say` prints: the first after `wait` seconds, one about units that are under way
    every `every` seconds; with `each` every planned unit has one, however soon."""

    def __init__(
        self,
        title: str,
        say: Callable[[str], None],
        wait: float,
        every: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        each: bool = False,
    ) -> None:
        self._title, self._say, self._every, self._clock, self._each = title, say, every, clock, each
        self._estimate = Estimate(clock)
        self._begun = clock()
        self._first, self._last = self._begun + wait, self._begun + wait - every
        self._planned: set[str] = set()

    def plan(self, expected: Sequence[Expected]) -> None:
        self._planned = {unit.name for unit in expected}
        self._estimate.plan(expected)

    def report(self, parts: tuple[str, ...], done: float) -> None:
        self._estimate.reached(done)
        self._line([": ".join(parts)], self._every)

    def finished(self, unit: Unit) -> None:
        if unit.replayed:
            self._estimate.taken_over(unit.share)
            return
        self._estimate.reached(unit.share)
        if unit.name in self._planned or unit.seconds >= WORTH_A_LINE:
            parts = [unit.name, *unit.told, format_short_duration(unit.seconds), format_memory(unit.memory)]
            self._line(parts, None if self._each else self._every / UNITS_FOR_LINE)

    def _line(self, parts: list[str], wait: float | None) -> None:
        """Say a line unless the last one was less than `wait` ago; None says it whenever it comes."""
        now = self._clock()
        if wait is not None and now < max(self._first, self._last + wait):
            return
        self._last = now
        whole = f"{self._estimate.share:.0%} after {format_clock(now - self._begun)}"
        left = [format_time_left(self._estimate.left())] if self._estimate.share < 1 else []
        self._say(f"{self._title}: {', '.join([*parts, whole, *left])}")


class Bar:
    """Lines that stay and a bar that moves, on a terminal; see `bar`."""

    def __init__(
        self, title: str, console: RichConsole, printable: Callable[[str], str], wait: float
    ) -> None:
        from rich.progress import BarColumn, ProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        roomy = console.width >= ROOMY
        estimate = self._estimate = Estimate()
        begun = self._begun = time.monotonic()

        class Left(ProgressColumn):
            """The time since the beginning and the estimate, of the moment."""

            def render(self, task: object) -> str:
                left = format_time_left(estimate.left()) if estimate.share < 1 else ""
                return f"{format_clock(time.monotonic() - begun)} {left}"

        self._console, self._printable, self._title, self._wait = console, printable, title, wait
        self._room = (
            console.width - (BAR if roomy else NARROW_BAR) - len("100% 0:00:00 about 0 h 00 min left") - 4
        )
        self._bar = RichProgress(
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            BarColumn(bar_width=BAR if roomy else NARROW_BAR),
            TextColumn("{task.percentage:>3.0f}%", markup=False, table_column=Column(no_wrap=True)),
            Left(table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            expand=True,
            refresh_per_second=REFRESHES,
        )
        self._task = self._bar.add_task(title, total=1.0)
        self._names = 0
        self._planned: set[str] = set()
        self._held: list[Unit] = []
        self._shown = False

    def plan(self, expected: Sequence[Expected]) -> None:
        self._planned = {unit.name for unit in expected}
        self._names = min(max(map(len, self._planned)), self._console.width // 3)
        self._estimate.plan(expected)

    def report(self, parts: tuple[str, ...], done: float) -> None:
        self._estimate.reached(done)
        description = _fit([self._title, *map(self._printable, parts)], self._room)
        self._bar.update(self._task, description=description, completed=self._estimate.share)
        self._show()

    def finished(self, unit: Unit) -> None:
        if unit.replayed:
            self._estimate.taken_over(unit.share)
        else:
            self._estimate.reached(unit.share)
            if unit.name in self._planned or unit.seconds >= WORTH_A_LINE:
                self._held.append(unit)
        self._bar.update(self._task, completed=self._estimate.share)
        self._show()

    def stop(self) -> None:
        self._bar.stop()

    def _show(self) -> None:
        if not self._shown and time.monotonic() - self._begun > self._wait:
            self._shown = True
            self._bar.start()
        if self._shown:
            for unit in self._held:
                self._print(unit)
            self._held.clear()

    def _print(self, unit: Unit) -> None:
        from rich.text import Text

        width = min(self._console.width, WIDEST)
        numbers = f"  {format_short_duration(unit.seconds):>7}  {format_memory(unit.memory):>7}"
        name = f"{self._printable(unit.name):<{self._names}}"
        room = width - len(name) - len(numbers) - 2
        parts = list(map(self._printable, unit.told))
        while parts and len(", ".join(parts)) > room:
            parts.pop()
        line = Text.assemble(name, "  ", f"{', '.join(parts):<{room}}", (numbers, "dim"))
        self._console.print(line, no_wrap=True, overflow="ellipsis", crop=True)


@contextmanager
def bar(title: str, printable: Callable[[str], str], wait: float) -> Iterator[Display]:
    """A Bar on stderr, a terminal, from `wait` seconds on; it disappears in the end, the lines stay."""
    from rich.console import Console as RichConsole

    shown = Bar(title, RichConsole(stderr=True, highlight=False), printable, wait)
    try:
        yield shown
    finally:
        shown.stop()


def _fit(parts: Sequence[str], room: int) -> str:
    """Return as many of the parts, the last ones, as there is room for."""
    first = 0
    while first < len(parts) - 1 and len(": ".join(parts[first:])) > room:
        first += 1
    return ": ".join(parts[first:])
