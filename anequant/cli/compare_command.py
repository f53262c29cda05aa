"""The command that compares recipes."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from anequant.cli.console import Console
from anequant.cli.options import (
    calibration_options,
    command,
    complete_recipes,
    read_calibration,
    read_recipe,
    window_options,
)
from anequant.cli.scheduling import scheduler_option
from anequant.errors import UsageError

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model")
@click.option(
    "--recipes",
    required=True,
    metavar="NAME|FILE,...",
    help="Recipes to run, in this order.",
    shell_complete=complete_recipes,
)
@click.option("--text", metavar="FILE|wikitext2", help="Text to measure on, instead of the bundled one.")
@window_options
@calibration_options
@click.option("--peers", is_flag=True, help="Also what coremltools and other packages make of MODEL.")
@click.option("--html", type=FILE, metavar="FILE", help="Also write a page with the table and a plot.")
@click.option("-o", "--output", type=FILE, help="New folder to keep the checkpoints in.")
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
@scheduler_option
@command
def compare(
    console: Console,
    model: str,
    recipes: str,
    text: str | None,
    windows: int,
    length: int,
    peers: bool,
    html: Path | None,
    output: Path | None,
    force: bool,
    scheduler: str,
    **options: Any,
) -> None:
    """What several recipes cost and bring on MODEL: one table of sizes, divergence from float, and times.

    Calibration tokens are collected once and the float model runs once. * marks the Pareto front: the
    recipes for which no other has both no more bits per weight and no larger KL. A recipe that fails is a
    row that says why, and its error is the exit code.

    \b
    anequant compare MODEL --recipes w8-nearest,w4-nearest --html compare.html
    """
    names = _names(recipes)
    for name in names.values():
        read_recipe({"recipe": name})
    if force and output is None:
        raise UsageError("--force replaces an output folder", remedy="name it with --output")
    if scheduler != "local" and output is None:
        raise UsageError(
            "workers write into the output folder", remedy="name one that they share with --output"
        )
    if html is not None:
        _check_page(html)
    from anequant.checkpoints.manifest import read_rotation_keys
    from anequant.checkpoints.source import resolve_source
    from anequant.comparison.compare import compare as run
    from anequant.jobs.scheduler import open_scheduler
    from anequant.report.terminal import comparison_table as shown

    source = resolve_source(model)
    rotated = read_rotation_keys(source.folder)
    with open_scheduler(scheduler, console.note) as tasks, console.watched("compare") as job:
        result = run(
            source,
            {label: read_recipe({"recipe": name}, rotated) for label, name in names.items()},
            read_calibration(options),
            text,
            windows=windows,
            length=length,
            peers=peers,
            output=output,
            force=force,
            progress=job.progress,
            control=replace(job.control, scheduler=tasks),
        )
    rows = shown.summary(result)
    if html is not None:
        shown.write_page(html, result)
        rows.append(("page", str(html)))
    console.table(result.to_dict(), shown.COLUMNS, shown.lines(result), rows)
    if result.exit_code:
        sys.exit(result.exit_code)


def _names(recipes: str) -> dict[str, str]:
    """Every recipe's name or file by what it is called: a file's name without its ending."""
    names: dict[str, str] = {}
    for word in filter(None, (word.strip() for word in recipes.split(","))):
        label = Path(word).stem
        if label in names:
            raise UsageError(f"two recipes are called '{label}'", remedy="name each once")
        names[label] = word
    if not names:
        raise UsageError("--recipes names none", remedy="for example --recipes w4-ane,w4-nearest")
    return names


def _check_page(path: Path) -> None:
    """Raises UsageError for a page that cannot be written, before anything long is done."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"page '{path}' cannot be written", remedy="name a file in a folder that exists")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"page '{path}' cannot be written", remedy="its folder is not yours to write to")
