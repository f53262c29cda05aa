"""--scheduler, and a job whose independent parts go where it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from anequant.cli.console import Console

if TYPE_CHECKING:
    from anequant.jobs.control import Run

Command = Callable[..., None]


def scheduler_option(run: Command) -> Command:
    """--scheduler."""
    text = "Who does independent parts: this process, or workers of a dask cluster that share the folders."
    metavar = "local|dask://HOST:PORT"
    return click.option("--scheduler", default="local", show_default=True, metavar=metavar, help=text)(run)


@contextmanager
def scheduled_job(console: Console, title: str, scheduler: str, **options: Any) -> Iterator[Run]:
    """`Console.job`, which takes `options`, with the scheduler of that name. Raises as `open_scheduler`."""
    from anequant.jobs.scheduler import open_scheduler

    with open_scheduler(scheduler, console.note) as tasks, console.job(title, **options) as run:
        yield replace(run, scheduler=tasks)
