"""What a run took: seconds of every step and the most memory, which are not the same twice."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from anequant.jobs.control import Unit


@dataclass
class Stopwatch:
    """Adds up the seconds of units by their stage, in order of first use."""

    seconds: dict[str, float] = field(default_factory=dict)
    _begun: float = field(default_factory=time.monotonic)

    def add(self, unit: Unit) -> None:
        """Take a unit that is done; one that an interrupted run did took no time here."""
        self.seconds[unit.stage] = self.seconds.get(unit.stage, 0.0) + unit.seconds

    def result(self) -> dict[str, Any]:
        """The `run` of report.json, up to now."""
        return {
            "seconds": time.monotonic() - self._begun,
            "steps": [{"step": stage, "seconds": seconds} for stage, seconds in self.seconds.items()],
            "peak_memory_bytes": peak_memory(),
        }


def peak_memory() -> int | None:
    """The most bytes this process has held in memory; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
