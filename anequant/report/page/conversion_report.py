"""A conversion that ends with its report, of what it took too: seconds of every stage and the most memory."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anequant.evaluation import SAMPLE_LENGTH, SAMPLE_WINDOWS
from anequant.jobs.control import UNWATCHED, Progress, Run, Unit
from anequant.jobs.step import Step, Work
from anequant.pipeline.convert import convert
from anequant.pipeline.converting import Converting, ConvertResult
from anequant.pipeline.steps.rounding import count_layer_work
from anequant.pipeline.steps.sizes import count_forward_work
from anequant.report.page.write_report import Report, read_report, write_report
from anequant.request import Request


@dataclass
class Stopwatch:
    """Adds up the seconds of units by their stage, in order of first use."""

    seconds: dict[str, float] = field(default_factory=dict)
    _begun: float = field(default_factory=lambda: time.monotonic())

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


PASSES = 4
"""Times that the windows go through a model."""


@dataclass(frozen=True, eq=False)
class WriteReport(Step[Converting, None]):
    """Write the report: layers are rounded again, and some windows go through both models."""

    stage = "report"
    kind = "report"

    request: Request
    watch: Stopwatch

    @property
    def cost(self) -> Work:
        spec, recipe = self.request.checkpoint.spec, self.request.recipe
        measuring = count_forward_work(spec, (SAMPLE_WINDOWS, SAMPLE_LENGTH), PASSES)
        return sum([count_layer_work(spec, recipe, None)] * spec.num_layers, measuring)

    def run(self, state: Converting, progress: Progress) -> None:
        write_report(state.folder, self.request.source, run=self.watch.result(), progress=progress)


def convert_and_report(request: Request, output: Path, run: Run = UNWATCHED) -> tuple[ConvertResult, Report]:
    """As `convert`, with a report of the time and memory of it in the output. Raises what it and
    `write_report` raise."""
    watch = Stopwatch()

    def finished(unit: Unit) -> None:
        watch.add(unit)
        run.finished(unit)

    report = WriteReport(request, watch)
    result = convert(request, output, replace(run, finished=finished), [report])
    return result, read_report(output)
