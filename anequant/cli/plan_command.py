"""`anequant plan`, and --max-memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from anequant.cli.console import Console
from anequant.cli.options import (
    calibration_options,
    command,
    lowering_options,
    read_calibration,
    read_lowering,
    read_recipe,
    recipe_options,
)

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>([KMG]I?)?)B?", re.IGNORECASE)


def _bytes(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Bytes of 4GB, 512MiB or a plain number."""
    match = None if value is None else _SIZE.fullmatch(value.strip())
    if value is not None and match is None:
        raise click.BadParameter(f"'{value}' is no size such as 4GB or 512MiB")
    try:
        return None if match is None else int(float(match["number"]) * UNITS[match["unit"].upper()])
    except OverflowError as error:
        raise click.BadParameter("that is more than any machine has") from error


def memory_option(run: Callable[..., None]) -> Callable[..., None]:
    """--max-memory."""
    text = "Most memory to use: kept without changing the output, or refused before anything is done."
    return click.option("--max-memory", callback=_bytes, metavar="SIZE", help=text)(run)


@click.command()
@click.argument("model", required=False)
@recipe_options
@calibration_options
@lowering_options
@memory_option
@command
def plan(console: Console, model: str | None, max_memory: int | None, **options: Any) -> None:
    """What convert would do with MODEL, from its config and headers alone: jobs, bytes, memory and time.

    What convert would refuse of them is refused in the same words. Of a hub id, no weights are downloaded.
    Peaks are given for quantize, lower and verify; times are an estimate.

    \b
    anequant plan org/name
    anequant plan FOLDER --recipe w8a8-ane --max-memory 8GB
    """
    read_recipe(options)
    from anequant.checkpoints.hub_headers import fetch_headers
    from anequant.checkpoints.manifest import read_rotation_keys
    from anequant.planning.plan import plan_source
    from anequant.report.terminal import planned

    with fetch_headers(model) as source:
        recipe = read_recipe(options, read_rotation_keys(source.folder))
        calibration, sizes = read_calibration(options), read_lowering(options)
        result, speed = plan_source(source, recipe, calibration, sizes, options["rotations"], max_memory)
    values = {"model": source.name, "revision": source.revision, "recipe": recipe.to_dict()}
    console.table(
        {**values, **result.to_dict(speed)},
        planned.COLUMNS,
        planned.jobs(result, speed),
        planned.summary(result, speed),
    )
