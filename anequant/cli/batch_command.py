"""The command that does many jobs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from anequant.cli.console import Console
from anequant.cli.options import command, resume_options
from anequant.cli.scheduling import memory_option, scheduler_option


@click.command()
@click.argument("jobs", type=click.Path(path_type=Path))
@partial(resume_options, force="Make outputs again that were made with other settings.")
@memory_option
@scheduler_option
@command
def batch(
    console: Console, jobs: Path, force: bool, resume: bool, max_memory: int | None, scheduler: str
) -> None:
    """Convert many models with many recipes, as the TOML file JOBS says, and end with one table.

    Jobs of one model share its calibration tokens. A job that fails is a row that says why, the others go on,
    and the exit code is that of the first failure. A second run does what is left: outputs that are there
    with the same settings are taken over, interrupted jobs go on where they stopped.

    \b
    anequant batch jobs.toml
    anequant batch jobs.toml --scheduler dask://10.0.0.1:8786
    """
    from anequant.comparison.batch import exit_code, run_batch
    from anequant.comparison.batch_file import read_batch
    from anequant.jobs.control import Run
    from anequant.jobs.scheduler import open_scheduler
    from anequant.report.page.conversion_report import convert_and_report
    from anequant.report.terminal.tables import tabulate_batch

    wanted = read_batch(jobs)
    with open_scheduler(scheduler, console.note) as tasks:

        @contextmanager
        def begin(name: str) -> Iterator[Run]:
            with console.job(f"batch: {name}", force=force, resume=resume, max_memory=max_memory) as run:
                yield replace(run, scheduler=tasks)

        rows = run_batch(wanted, begin, convert_and_report, console.note, force=force)
    code = exit_code(rows)
    values = {"output": str(wanted.output), "jobs": [row.to_dict() for row in rows], "exit_code": code}
    console.table(values, tabulate_batch(rows))
    if code:
        sys.exit(code)
