"""Options that say what a checkpoint is lowered to."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from anequant.cli.options import Command
from anequant.lower_options import (
    BOTH,
    COREAI,
    COREML,
    KV_FORMS,
    AssetOptions,
    LowerOptions,
    Targets,
    choose_targets,
)


def _chunk_count(context: click.Context, option: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdigit():
        raise click.BadParameter(f"'{value}' is neither auto nor a whole number")
    return int(value)


def _ladder(context: click.Context, option: click.Parameter, value: str | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(value, tuple):
        return value
    if not all(part.strip().isdigit() for part in value.split(",")):
        raise click.BadParameter(f"'{value}' is not whole numbers between commas, as in 8,16,64")
    return tuple(int(part) for part in value.split(","))


def lowering_options(run: Command, *, both: bool = True) -> Command:
    """Add --target, and one option for every field of LowerOptions and AssetOptions; `read_lowering` reads
    them."""
    default, asset = LowerOptions(), AssetOptions()
    kv = "Core AI: who keeps the cache, the asset or the host."
    run = click.option("--kv", type=click.Choice(KV_FORMS), default=asset.kv, show_default=True, help=kv)(run)
    sizes = "Core AI: positions that functions take at once."
    shown = ",".join(map(str, asset.ladder))
    form: dict[str, Any] = {
        "type": click.UNPROCESSED,
        "callback": _ladder,
        "show_default": shown,
        "metavar": "N,N,..",
    }
    run = click.option("--ladder", default=asset.ladder, help=sizes, **form)(run)
    what = "Core ML packages, an asset of Core AI, or both."
    targets = click.Choice([COREML, COREAI, BOTH] if both else [COREML, COREAI])
    run = click.option("--target", type=targets, default=COREML, show_default=True, help=what)(run)
    prefix = "Beginning of the file names, instead of the architecture's."
    run = click.option("--prefix", metavar="NAME", help=prefix)(run)
    argmax = "End the head in the best token of each part instead of logits."
    run = click.option("--argmax", is_flag=True, help=argmax)(run)
    number = "Number of decoder packages; auto takes as few as --max-chunk-mb allows."
    run = click.option("--chunks", default="auto", show_default=True, callback=_chunk_count, help=number)(run)
    for name, value, text in (
        ("--max-chunk-mb", default.max_chunk_mb, "Most megabytes of a package with --chunks auto."),
        ("--batch", default.batch, "Positions that prefill takes at once."),
        ("--context", default.context, "Most tokens the packages hold."),
    ):
        run = click.option(name, type=int, default=value, show_default=True, help=text)(run)
    return run


def read_lowering(options: dict[str, Any]) -> Targets:
    """Return what `lowering_options` ask for, as `choose_targets` does; raises as it."""
    lowering = LowerOptions(**{item.name: options[item.name] for item in dataclasses.fields(LowerOptions)})
    asset = AssetOptions(**{item.name: options[item.name] for item in dataclasses.fields(AssetOptions)})
    return choose_targets(options["target"], lowering, asset)
