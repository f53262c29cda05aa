"""A conversion and the report in its output."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from anequant.checkpoints.source import Source
from anequant.errors import Interrupted
from anequant.pipeline.convert import ConvertResult, convert
from anequant.pipeline.footprint import resident_bytes
from anequant.pipeline.schedule import REPORT
from anequant.progress import CONTROL, Control, Expected, Progress, Unit, part_of, shares, silent
from anequant.recipe import Calibration, LowerOptions, Recipe
from anequant.report.run import Stopwatch
from anequant.report.write import Written, write_report


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
) -> tuple[ConvertResult, Written]:
    """As `convert`, and then as `write_report` with the time and memory of it. Raises what they raise."""
    watch = Stopwatch()
    start = 1.0

    def planned(units: Sequence[Expected]) -> None:
        nonlocal start
        start, _ = shares(units)[REPORT]
        control.planned(units)

    result = convert(
        source,
        output,
        recipe,
        calibration,
        options,
        rotations_file,
        force=force,
        progress=watch.listen(progress),
        control=replace(control, planned=planned),
        collected=collected,
    )
    begun = time.monotonic()
    reporting = part_of(progress, REPORT, start, 1.0)
    try:
        report = write_report(output, source, run=watch.result(), progress=reporting)
    except KeyboardInterrupt as stop:
        kept = f"'{output}' is complete but for its report"
        raise Interrupted(kept, [REPORT, str(output)]) from stop
    seconds = time.monotonic() - begun
    control.finished(Unit(REPORT, (), seconds, resident_bytes(), 1.0, replayed=False))
    return result, report
