"""The commands that write an output, each a job that goes on where an interrupted run stopped."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from anequant.cli.console import Console
from anequant.cli.options import (
    calibration_options,
    command,
    output_options,
    read_calibration,
    read_recipe,
    read_request,
    recipe_options,
    rotation_options,
)
from anequant.cli.scheduling import memory_option, scheduled_job, scheduler_option
from anequant.cli.target_options import lowering_options, read_lowering


@click.command()
@click.argument("model")
@output_options
@recipe_options
@calibration_options
@memory_option
@scheduler_option
@command
def quantize(console: Console, model: str, output: Path, **options: Any) -> None:
    """Fold, rotate and quantize MODEL into a new checkpoint folder.

    \b
    anequant quantize org/name -o CHECKPOINT
    anequant quantize FOLDER -o CHECKPOINT --recipe w4-nearest --head-bits 6
    """
    request = read_request(console, model, options)
    from anequant.pipeline.quantize import quantize as quantize_model
    from anequant.report.terminal import results as text

    with scheduled_job(console, "quantize", options) as run:
        result = quantize_model(request, output, run)
    console.result({"output": str(output), **result.to_dict()}, text.describe_quantization(output, result))


@click.command()
@click.argument("model")
@output_options
@rotation_options
@calibration_options
@command
def rotate(console: Console, model: str, output: Path, force: bool, resume: bool, **options: Any) -> None:
    """Fold and rotate MODEL into a new float checkpoint, which quantize then takes.

    --restarts and --learn measure rotations on what --recipe would quantize.

    \b
    anequant rotate org/name -o ROTATED --r1 hadamard --restarts 8
    anequant quantize ROTATED -o CHECKPOINT
    """
    request = read_request(console, model, options)
    from anequant.pipeline.rotate import rotate as rotate_model
    from anequant.report.terminal import results as text

    with console.job("rotate", force=force, resume=resume) as run:
        result = rotate_model(request, output, run)
    console.result({"output": str(output), **result.to_dict()}, text.describe_rotation(output, result))


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@output_options
@partial(lowering_options, both=False)
@memory_option
@scheduler_option
@command
def lower(console: Console, checkpoint: Path, output: Path, **options: Any) -> None:
    """Lower a quantized CHECKPOINT to Core ML packages, or an asset of Core AI, in a new folder.

    \b
    anequant lower CHECKPOINT -o PACKAGES
    anequant lower CHECKPOINT -o PACKAGES --context 2048 --batch 64 --chunks 2
    anequant lower CHECKPOINT -o BUNDLE --target coreai --context 4096
    """
    from anequant.pipeline.lower import lower as lower_checkpoint
    from anequant.report.terminal import results as text
    from anequant.request import LowerRequest

    request = LowerRequest(checkpoint, read_lowering(options).only)
    with scheduled_job(console, "lower", options) as run:
        result = lower_checkpoint(request, output, run)
    console.result({"output": str(output), **result.to_dict()}, text.describe_lowering(output, result))


@click.command()
@click.argument("model", required=False)
@output_options
@recipe_options
@calibration_options
@lowering_options
@memory_option
@scheduler_option
@command
def convert(console: Console, model: str | None, output: Path, **options: Any) -> None:
    """Quantize MODEL, lower it, verify the packages and write a report; without MODEL, the bundled one.

    \b
    anequant convert -o OUT
    anequant convert org/name@revision -o OUT --recipe w6-ane --max-memory 8GB
    """
    targets = read_lowering(options)
    request = read_request(console, model, options)
    request = replace(request, lowering=targets.lowering, asset=targets.asset)
    from anequant.report.page.conversion_report import convert_and_report
    from anequant.report.terminal import results as text

    source = request.source
    if model is None:
        console.note(f"no model named: converting the bundled {source.name}")
    with scheduled_job(console, "convert", options) as run:
        result, report = convert_and_report(request, output, run)
    rows = [*text.describe_conversion(output, result), *text.describe_report(report)]
    console.result({"model": source.name, "output": str(output), **result.to_dict()}, rows)


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
        calibration, targets = read_calibration(options), read_lowering(options)
        request = Request(
            source, recipe, calibration, options["rotations"], targets.lowering, asset=targets.asset
        )
        result, speed = plan_conversion(request, max_memory)
    values = {"model": source.name, "revision": source.revision, "recipe": recipe.to_dict()}
    console.table({**values, **result.to_dict(speed)}, tabulate_plan(result, speed))
