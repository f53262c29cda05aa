"""How long work tells whoever watches, and is told to stop; the console decides what to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anequant.jobs.tasks import Schedulers, local

Progress = Callable[[str, float], None]
"""(what is being done, share done from 0 to 1)"""


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

    `told` is what was measured, the most important first; `seconds` is what it took here, `memory` the bytes
    that the process then held, and `share` what of the job is done with it.
    """

    name: str
    told: tuple[str, ...]
    seconds: float
    memory: int
    share: float
    replayed: bool


def silent(what: str, done: float) -> None:
    """A Progress that shows nothing."""


def part_of(progress: Progress, step: str, start: float, end: float) -> Progress:
    """A Progress for one step that takes the share from `start` to `end` of the whole."""

    def report(what: str, done: float) -> None:
        progress(f"{step}: {what}", start + (end - start) * done)

    return report


def step_of(progress: Progress, step: str) -> Progress:
    """A Progress for one step of a job whose units know their shares of the whole."""
    return part_of(progress, step, 0.0, 1.0)


def shares(expected: Sequence[Expected]) -> dict[str, tuple[float, float]]:
    """From where to where of the whole every unit is, by its weight."""
    total, begun, found = sum(unit.weight for unit in expected), 0.0, {}
    for unit in expected:
        found[unit.name] = begun / total, (begun + unit.weight) / total
        begun += unit.weight
    return found


def no_note(text: str) -> None:
    """Drops a line."""


def no_plan(expected: Sequence[Expected]) -> None:
    """Drops what a job is going to do."""


def no_unit(unit: Unit) -> None:
    """Drops what a job has done."""


def never() -> bool:
    """Goes on to the end."""
    return False


@dataclass(frozen=True)
class Control:
    """How whoever starts a long job steers it and watches it.

    resume      whether what an interrupted run has done is taken up, or else thrown away
    note        gets a line that is worth reading when progress is not shown
    stopping    asked when a unit of work is done: whether to stop there
    max_memory  bytes that the job is to stay within, None for as many as it is fastest with
    planned     gets the units that the job is going to do, those included that an interrupted run did
    finished    gets every unit that is done
    scheduler   who does the parts of the job that are independent of each other
    """

    resume: bool = True
    note: Callable[[str], None] = no_note
    stopping: Callable[[], bool] = never
    max_memory: int | None = None
    planned: Callable[[Sequence[Expected]], None] = no_plan
    finished: Callable[[Unit], None] = no_unit
    scheduler: Schedulers = local


CONTROL = Control()
