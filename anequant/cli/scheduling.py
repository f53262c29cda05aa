"""--max-memory and --scheduler, and a job whose independent parts go where the latter says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import click

from anequant.cli.console import Console, Job
from anequant.units import parse_bytes

Run = Callable[..., None]


def _read_bytes(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    except OverflowError as error:
        raise click.BadParameter("that is more than any machine has") from error


def memory_option(run: Run) -> Run:
    """Add --max-memory."""
    text = "Most memory to use: kept without changing the output, or refused before anything is done."
    return click.option("--max-memory", callback=_read_bytes, metavar="SIZE", help=text)(run)


def scheduler_option(run: Run) -> Run:
    """Add --scheduler."""
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
