"""What a job needs of its inputs, looked at before any weight is read: by the job itself and by its plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from anequant.calibration.equivalence import PROBE_LENGTH
from anequant.calibration.rotation_choice import check_rotations, matrices_from_file
from anequant.calibration.tokens import check_calibration
from anequant.checkpoints.manifest import read_rotation_keys
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.rotation_files import read_rotations
from anequant.checkpoints.source import Source
from anequant.quantization.online import plan_online
from anequant.recipe import Calibration, Recipe
from anequant.reference.forward import check_window
from anequant.reference.open_float import check_rotated

UNROTATED: dict[str, Any] = {"r1": "none", "r2": "none", "restarts": 1, "learn": 0}
"""What is left to rotate in a checkpoint that is rotated already."""


def calibrates(source: Source, recipe: Recipe) -> bool:
    """Whether quantizing needs calibration tokens; a source that is rotated already needs none for that."""
    rotated = read_rotation_keys(source.folder) is not None
    return (replace(recipe, **UNROTATED) if rotated else recipe).calibrated


def check_job(
    source: Source, checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration, rotations: Path | None
) -> None:
    """Refuse what quantizing `source`, opened as `checkpoint`, would be refused for on its way.

    `rotations` is a file of rotations, None without. Raises as `check_window` for the tokens of the
    equivalence check, `check_rotations`, `read_rotations`, `check_rotated`, `plan_online` and
    `check_calibration` do.
    """
    check_window(checkpoint.spec, PROBE_LENGTH)
    keys = read_rotation_keys(source.folder)
    if keys is None:
        check_rotations(checkpoint.spec, recipe, rotations)
        if rotations is not None:
            read_rotations(rotations, matrices_from_file(checkpoint.spec, recipe))
    else:
        check_rotated(checkpoint, keys, recipe, rotations)
    plan_online(checkpoint.spec, recipe)
    if calibrates(source, recipe):
        check_calibration(calibration, checkpoint)
