"""--scheduler, and a job whose independent parts go where it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import click

from anequant.cli.console import Console, Job

Run = Callable[..., None]


def scheduler_option(run: Run) -> Run:
    """--scheduler."""
    text = "Who does independent parts: this process, or workers of a dask cluster that share the folders."
    metavar = "local|dask://HOST:PORT"
    return click.option("--scheduler", default="local", show_default=True, metavar=metavar, help=text)(run)


@contextmanager
def scheduled_job(
    console: Console, title: str, resume: bool, max_memory: int | None, scheduler: str
) -> Iterator[Job]:
    """`Console.job` with the scheduler of that name. Raises as `open_scheduler` does."""
    from anequant.jobs.scheduler import open_scheduler

    with open_scheduler(scheduler, console.note) as tasks, console.job(title, resume, max_memory) as job:
        yield replace(job, control=replace(job.control, scheduler=tasks))
