"""How a job tells whoever watches it, and is steered by whoever starts it; the console shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from anequant.jobs.tasks import Schedulers, local

Show = Callable[[tuple[str, ...], float], None]
"""Gets what is being done, from the whole to its part, and the share done of the whole, from 0 to 1."""


def show_nothing(parts: tuple[str, ...], done: float) -> None:
    """Drop what is being done."""


@dataclass(frozen=True)
class Progress:
    """Tells `show` how far a piece of work is, which lies `within` others and takes a share of the whole.

    Called with what is being done and the share done of the piece itself, from 0 to 1.
    """

    show: Show
    within: tuple[str, ...] = ()
    start: float = 0.0
    end: float = 1.0

    def __call__(self, what: str, done: float) -> None:
        self.show((*self.within, what), self.start + (self.end - self.start) * done)

    def part(self, name: str, start: float, end: float) -> Progress:
        """Return the Progress of a piece called `name`, from `start` to `end` of this one."""
        return replace(self.share(start, end), within=(*self.within, name))

    def share(self, start: float, end: float) -> Progress:
        """Return the Progress of a piece without a name, from `start` to `end` of this one."""
        span = self.end - self.start
        return replace(self, start=self.start + span * start, end=self.start + span * end)


silent = Progress(show_nothing)


@dataclass(frozen=True)
class Expected:
    """A unit of work that a job is going to do.

    `weight` is in no particular measure: units of one `kind` are known to take time in proportion to it, and
    those of others as far as is known.
    """

    name: str
    kind: str
    weight: float


@dataclass(frozen=True)
class Unit:
    """A unit of work that is done, here or (`replayed`) by the run that was interrupted.

    `stage` is the part of the job that it belongs to; `told` is what was measured, the most important first;
    `seconds` is what it took here, `memory` the bytes that the process then held, and `share` what of the job
    is done with it.
    """

    name: str
    stage: str
    told: tuple[str, ...]
    seconds: float
    memory: int
    share: float
    replayed: bool


def measure_shares(expected: Sequence[Expected]) -> dict[str, tuple[float, float]]:
    """Return from where to where of the whole every unit is, by its weight."""
    total, begun, found = sum(unit.weight for unit in expected) or 1.0, 0.0, {}
    for unit in expected:
        found[unit.name] = begun / total, (begun + unit.weight) / total
        begun += unit.weight
    return found


def drop_note(text: str) -> None:
    """Drop a line."""


def drop_plan(expected: Sequence[Expected]) -> None:
    """Drop what a job is going to do."""


def drop_unit(unit: Unit) -> None:
    """Drop what a job has done."""


def never_stop() -> bool:
    """Let a job run to its end."""
    return False


@dataclass(frozen=True)
class Run:
    """How whoever starts a job watches and steers it.

    progress    told what is being done
    force       whether an existing output is replaced
    resume      whether what an interrupted run has done is taken up, or else thrown away
    max_memory  bytes that the job is to stay within, None for as many as it is fastest with
    scheduler   does the parts of the job that are independent of each other
    note        gets a line that is worth reading when progress is not shown
    stopping    asked when a unit of work is done: whether to stop there
    planned     gets the units that the job is going to do, those included that an interrupted run did
    finished    gets every unit that is done
    """

    progress: Progress = silent
    force: bool = False
    resume: bool = True
    max_memory: int | None = None
    scheduler: Schedulers = local
    note: Callable[[str], None] = drop_note
    stopping: Callable[[], bool] = never_stop
    planned: Callable[[Sequence[Expected]], None] = drop_plan
    finished: Callable[[Unit], None] = drop_unit


UNWATCHED = Run()
"""A run that nobody watches or steers."""
