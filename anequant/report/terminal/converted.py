"""A conversion and the report in its output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from anequant.evaluation import SAMPLE_LENGTH, SAMPLE_WINDOWS
from anequant.jobs.control import UNWATCHED, Progress, Run, Unit
from anequant.jobs.step import Step, Work
from anequant.pipeline.convert import convert
from anequant.pipeline.converting import Converting, ConvertResult
from anequant.pipeline.steps.rounding import layer_work
from anequant.pipeline.steps.sizes import forward_work
from anequant.report.page.run import Stopwatch
from anequant.report.page.write_report import Report, read_report, write_report
from anequant.request import Request

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
    def id(self) -> str:
        return "report"

    @property
    def cost(self) -> Work:
        spec, recipe = self.request.checkpoint.spec, self.request.recipe
        measuring = forward_work(spec, (SAMPLE_WINDOWS, SAMPLE_LENGTH), PASSES)
        return sum([layer_work(spec, recipe, None)] * spec.num_layers, measuring)

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
