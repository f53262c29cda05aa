"""The command that tells what convert would do."""

from __future__ import annotations

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
from anequant.cli.scheduling import memory_option


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
    from anequant.pipeline.plan import plan_conversion
    from anequant.report.terminal.tables import tabulate_plan
    from anequant.request import Request

    with fetch_headers(model) as source:
        recipe = read_recipe(options, source.folder)
        calibration, sizes = read_calibration(options), read_lowering(options)
        request = Request(source, recipe, calibration, options["rotations"], sizes)
        result, speed = plan_conversion(request, max_memory)
    values = {"model": source.name, "revision": source.revision, "recipe": recipe.to_dict()}
    console.table({**values, **result.to_dict(speed)}, tabulate_plan(result, speed))
