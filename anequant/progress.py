"""How long work tells whoever watches, and is told to stop; the console decides what to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, float], None]
"""(what is being done, share done from 0 to 1)"""


def silent(what: str, done: float) -> None:
    """A Progress that shows nothing."""


def part_of(progress: Progress, step: str, start: float, end: float) -> Progress:
    """A Progress for one step that takes the share from `start` to `end` of the whole."""

    def report(what: str, done: float) -> None:
        progress(f"{step}: {what}", start + (end - start) * done)

    return report


def no_note(text: str) -> None:
    """Drops a line."""


def never() -> bool:
    """Goes on to the end."""
    return False


@dataclass(frozen=True)
class Control:
    """How whoever starts a long job steers it.

    resume      whether what an interrupted run has done is taken up, or else thrown away
    note        gets a line that is worth reading when progress is not shown
    stopping    asked when a unit of work is done: whether to stop there
    max_memory  bytes that the job is to stay within, None for as many as it is fastest with
    """

    resume: bool = True
    note: Callable[[str], None] = no_note
    stopping: Callable[[], bool] = never
    max_memory: int | None = None


CONTROL = Control()
