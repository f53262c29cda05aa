"""A conversion and the report in its output."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from anequant.checkpoints.source import Source
from anequant.jobs.control import CONTROL, Control, Progress, silent
from anequant.pipeline.convert import ConvertResult, convert
from anequant.recipe import Calibration, LowerOptions, Recipe
from anequant.report.page.run import Stopwatch
from anequant.report.page.write_report import Report, read_report, write_report


def convert_and_report(
    source: Source,
    output: Path,
    recipe: Recipe,
    calibration: Calibration,
    options: LowerOptions,
    rotations_file: Path | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
    control: Control = CONTROL,
    collected: Tensor | None = None,
) -> tuple[ConvertResult, Report]:
    """As `convert`, with a report of the time and memory of it in the output. Raises what it and
    `write_report` raise."""
    watch = Stopwatch()

    def report(folder: Path, reporting: Progress) -> None:
        write_report(folder, source, run=watch.result(), progress=reporting)

    result = convert(
        source,
        output,
        recipe,
        calibration,
        options,
        rotations_file,
        force=force,
        progress=watch.listen(progress),
        control=control,
        collected=collected,
        report=report,
    )
    return result, read_report(output)
