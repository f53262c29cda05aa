"""How much longer a job takes, from what it has done so far, or that this cannot be told yet.

The share that is done moves from 0 to 1, through units of work of several kinds. The time between two reports
is put down to the kinds that the share went through in between. So each kind gets a pace, seconds for the
whole of the job if all of it were of that kind, and what is left of a kind takes its own pace, or that of all
others together where none of it is done yet. What an interrupted run did moves the share and takes no time.

Nothing is told until a part of the work is done and most of the rest is of kinds that have a pace: before,
the estimate would be that of the plan, for another machine. From then on something is told to the end.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from anequant.jobs.control import Expected, measure_shares

ENOUGH = 0.05
"""Share of what is to be done here that has to be done before anything is told."""

KNOWN = 0.5
"""Share of what is left that has to be of kinds that have a pace."""


class Estimate:
    """Listens to the share that is done; `clock` tells seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: list[tuple[float, str]] = [(1.0, "")]
        self._seconds: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._at = self._taken_over = 0.0
        self._since: float | None = None
        self._telling = False

    @property
    def share(self) -> float:
        """What is done of the whole, from 0 to 1."""
        return self._at

    def plan(self, expected: Sequence[Expected]) -> None:
        """The units of the job, before any of them; without, all work is of one kind."""
        ends = measure_shares(expected)
        self._ends = [(ends[unit.name][1], unit.kind) for unit in expected]

    def reached(self, share: float) -> None:
        """The job is at `share`, by work of this process."""
        now = self._clock()
        if self._since is not None:
            parts = self._between(self._at, share) or {self._kind(): 0.0}
            moved = sum(parts.values())
            for kind, part in parts.items():
                spent = (now - self._since) * (part / moved if moved else 1.0)
                self._seconds[kind] = self._seconds.get(kind, 0.0) + spent
                self._shares[kind] = self._shares.get(kind, 0.0) + part
        self._at, self._since = max(self._at, share), now

    def taken_over(self, share: float) -> None:
        """The job is at `share`, by work of the run that was interrupted: the time since then is no pace."""
        self._taken_over += max(0.0, share - self._at)
        self._at, self._since = max(self._at, share), None

    def left(self) -> float | None:
        """Seconds until the job is done; None while that cannot be told."""
        done = sum(self._shares.values())
        left = self._between(self._at, 1.0)
        paces = {kind: self._seconds[kind] / share for kind, share in self._shares.items() if share > 0}
        known = sum(part for kind, part in left.items() if kind in paces)
        enough = done >= ENOUGH * (1 - self._taken_over) and known >= KNOWN * sum(left.values())
        self._telling = done > 0 and (self._telling or enough)
        if not self._telling:
            return None
        usual = sum(self._seconds.values()) / done
        rest = {kind: part * paces.get(kind, usual) for kind, part in left.items()}
        waited = self._clock() - self._since if self._since is not None else 0.0
        unit = self._between(self._at, self._end()).get(self._kind(), 0.0) * paces.get(self._kind(), usual)
        return sum(rest.values()) - min(waited, unit)

    def _between(self, start: float, end: float) -> dict[str, float]:
        """The share that each kind has of what is from `start` to `end`."""
        found: dict[str, float] = {}
        for (begun, _), (ended, kind) in itertools.pairwise([(0.0, ""), *self._ends]):
            part = min(end, ended) - max(start, begun)
            if part > 0:
                found[kind] = found.get(kind, 0.0) + part
        return found

    def _end(self) -> float:
        """Where the unit at hand ends."""
        return next((end for end, _ in self._ends if end > self._at), 1.0)

    def _kind(self) -> str:
        return next((kind for end, kind in self._ends if end > self._at), self._ends[-1][1])
