"""Work in independent parts, and who does them: this process one after the other, or a cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from anequant.errors import ResourceError

Task = TypeVar("Task")
Result = TypeVar("Result")


class TasksLost(ResourceError):
    """Nobody is there to do tasks; what a job has done by then is kept."""


class Scheduler(Protocol):
    """Does tasks that do not depend on each other, with the same results wherever they are done."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """What `function` makes of every task, in their order; tasks are asked for as there is room for them.

        `function` is one of a module. A task and a result are plain values, tensors, paths, and dataclasses
        of anequant, also nested; a path is one that all who work see. Once closed, whoever still works on a
        task finds no place for what it makes. Raises what `function` raises, and TasksLost.
        """


Schedulers = Callable[[Path], Scheduler]
"""Makes the Scheduler of a job, which may keep files in a folder that is made for it."""


class Local:
    """One task after the other in this process, each when its result is asked for."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        yield from map(function, tasks)


def local(folder: Path) -> Scheduler:
    """Return the scheduler that is this process, which needs no files."""
    return Local()
