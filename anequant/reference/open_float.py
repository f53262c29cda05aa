"""Float checkpoints as sources: not quantized yet, and what they are rotated with already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anequant.checkpoints.manifest import CHECKPOINT, MANIFEST, read_kind, read_rotation_keys
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.side_files import check_side_files
from anequant.checkpoints.source import Source
from anequant.errors import InputError, UsageError
from anequant.quantization.online import plan_online
from anequant.recipe import Recipe
from anequant.recipe_files import recipe_from_dict
from anequant.reference.judge import check_reading


def open_float(source: Source) -> Checkpoint:
    """Return the checkpoint of a float model, rotated or not, read as stock transformers reads it.

    Raises InputError for a quantized one, and what `check_side_files` and `check_reading` raise.
    """
    checkpoint = open_checkpoint(source.folder)
    check_side_files(source.folder)
    reasons = {
        "it has output scales": checkpoint.is_quantized,
        f"{MANIFEST} says so": read_kind(source.folder) == CHECKPOINT,
        "it has a quantization_config": checkpoint.online.active
        and read_rotation_keys(source.folder) is None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"'{source.folder}' is already quantized ({reason})",
                remedy="start from the original float checkpoint, or lower this one",
            )
    check_reading(checkpoint)
    return checkpoint


def check_rotated(
    checkpoint: Checkpoint, keys: Mapping[str, Any], recipe: Recipe, rotations_file: Path | None
) -> None:
    """Raises UsageError unless `recipe` agrees with the `keys` that a checkpoint was rotated with, InputError
    when these are not what its config.json runs."""
    where = str(checkpoint.folder)
    if rotations_file is not None:
        raise UsageError(f"'{where}' is rotated already", remedy="leave out --rotations")
    for key, value in keys.items():
        if getattr(recipe, key) != value:
            raise UsageError(
                f"recipe key '{key}' is {getattr(recipe, key)!r}, and '{where}' was rotated with {value!r}",
                remedy=f"use {value!r}, or start from the original float checkpoint",
            )
    own, running = plan_online(checkpoint.spec, recipe_from_dict(keys)), checkpoint.online
    for name in ("r3", "r4"):
        ours, theirs = (getattr(online, name) for online in (own, running))
        if (ours and ours.order) != (theirs and theirs.order) or running != running.rotations:
            raise InputError(f"{MANIFEST} and config.json do not run the same {name}", where=where)
