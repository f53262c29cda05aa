"""--max-memory and --scheduler, and a job whose independent parts go where the latter says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from anequant.cli.console import Console
from anequant.cli.options import Command
from anequant.units import parse_bytes

if TYPE_CHECKING:
    from anequant.jobs.control import Run


def _read_bytes(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    except OverflowError as error:
        raise click.BadParameter("that is more than any machine has") from error


def memory_option(run: Command) -> Command:
    """Add --max-memory."""
    text = "Most memory to use: kept without changing the output, or refused before anything is done."
    return click.option("--max-memory", callback=_read_bytes, metavar="SIZE", help=text)(run)


def scheduler_option(run: Command) -> Command:
    """Add --scheduler."""
    text = "Who does independent parts: this process, or workers of a dask cluster that share the folders."
    metavar = "local|dask://HOST:PORT"
    return click.option("--scheduler", default="local", show_default=True, metavar=metavar, help=text)(run)


@contextmanager
def scheduled_job(console: Console, title: str, options: Mapping[str, Any]) -> Iterator[Run]:
    """`Console.job` as `output_options`, `memory_option` and `scheduler_option` steer it. Raises as
    `open_scheduler`."""
    from anequant.jobs.scheduler import open_scheduler

    steering = {name: options[name] for name in ("force", "resume", "max_memory")}
    with open_scheduler(options["scheduler"], console.note) as tasks, console.job(title, **steering) as run:
        yield replace(run, scheduler=tasks)
