"""A step of a job: what it does, and what it will read, write, hold and compute, told before it runs.

A plan is a list of steps, and a run does that list: `Journal.do` takes them in their order and no others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from anequant.jobs.control import Expected, Progress

State = TypeVar("State")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """Multiplications and additions of matrix products, in float32, and bytes gone over."""

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Speed:
    """A second's flops and bytes."""

    flops: float
    bytes: float

    def seconds(self, work: Work) -> float:
        return work.flops / self.flops + work.bytes / self.bytes


NOMINAL = Speed(flops=6e10, bytes=2e10)
"""One core of a server of 2023: only the proportions of its times are used."""


class Step(ABC, Generic[State, Result]):
    """One kind of step; an instance is a unit of work of one job.

    stage   the part of the job that it belongs to
    kind    steps of one kind take time in proportion to their cost
    result  the type of what `run` returns, which the journal keeps as JSON
    """

    stage: ClassVar[str]
    kind: ClassVar[str]
    result: ClassVar[Any] = type(None)

    @property
    def id(self) -> str:
        """The name in the journal and wherever a run is watched; no other step of a job has it."""
        return self.kind

    @property
    def title(self) -> str:
        """The name of the step in a plan."""
        return self.id

    @property
    def moves(self) -> tuple[int, int]:
        """The bytes that the step reads and those that it writes."""
        return 0, 0

    @property
    def holds(self) -> int:
        """The bytes that the step holds at its peak, above what the imports of a job take."""
        return 0

    @property
    def cost(self) -> Work:
        """What the step computes; as much as going over what it moves, where no step says more."""
        return Work(0, sum(self.moves))

    @abstractmethod
    def run(self, state: State, progress: Progress) -> Result:
        """Do the step; the files that it made are complete when this returns."""

    def replay(self, state: State, result: Result) -> None:
        """Bring `state` to where it was when an earlier run had done the step with this result."""

    def accept(self, state: State, result: Result) -> None:
        """Give later steps what they need of the result, whichever run did the step."""

    def tell(self, result: Result) -> Sequence[str]:
        """Return what is worth showing of the result, the most important first."""
        return ()


AnyStep = Step[Any, Any]


def expect(steps: Iterable[AnyStep]) -> list[Expected]:
    """Return the units that steps are, weighted by their seconds on a nominal machine."""
    return [Expected(step.id, step.kind, NOMINAL.seconds(step.cost)) for step in steps]
