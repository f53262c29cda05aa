"""What a run took: seconds of every step and the most memory, which are not the same twice."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from anequant.jobs.control import Progress


@dataclass
class Stopwatch:
    """Listens to a Progress whose texts begin with "step: "; `seconds` by step, in order of first use."""

    seconds: dict[str, float] = field(default_factory=dict)
    _begun: float = field(default_factory=lambda: time.monotonic())
    _last: float | None = None
    _step: str | None = None

    def listen(self, progress: Progress) -> Progress:
        """The same Progress, listened to."""

        def report(what: str, done: float) -> None:
            self._enter(what.partition(":")[0])
            progress(what, done)

        return report

    def result(self) -> dict[str, Any]:
        """The `run` of report.json, up to now."""
        self._enter(None)
        return {
            "seconds": time.monotonic() - self._begun,
            "steps": [{"step": step, "seconds": seconds} for step, seconds in self.seconds.items()],
            "peak_memory_bytes": peak_memory(),
        }

    def _enter(self, step: str | None) -> None:
        now = time.monotonic()
        if self._step is not None and self._last is not None:
            self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._last
        self._last, self._step = now, step


def peak_memory() -> int | None:
    """The most bytes this process has held in memory; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
