"""What later units of a job need of earlier ones and is no part of the output: files in its work folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anequant.calibration.rotation_choice import RotationChoice, Rotations, choose_rotations
from anequant.calibration.tokens import read_calibration_tokens
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.rotation_files import ROTATIONS, read_rotations, write_rotations
from anequant.jobs.control import Progress
from anequant.jobs.journal import Journal
from anequant.jobs.process import resident_bytes
from anequant.jobs.work_folder import DamagedWork
from anequant.planning.baseline import samples_resident
from anequant.planning.schedule import CALIBRATION_TOKENS
from anequant.planning.steps import ROTATING
from anequant.recipe import Calibration, Recipe
from anequant.rotation.rotation_plan import list_matrix_sizes, plan_rotations

TOKENS = "tokens"


def collect_tokens(
    calibration: Calibration, checkpoint: Checkpoint, progress: Progress, max_memory: int | None = None
) -> Tensor:
    """`read_calibration_tokens`, the model in memory where there is room. Raises what it does."""
    resident = samples_resident(checkpoint, calibration, max_memory, resident_bytes())
    return read_calibration_tokens(calibration, checkpoint, progress, resident=resident)


def kept_tokens(
    journal: Journal,
    calibration: Calibration,
    checkpoint: Checkpoint,
    progress: Progress,
    collected: Tensor | None = None,
) -> Tensor:
    """`collect_tokens`, or what it `collected` before, as a unit. Raises what it does, and DamagedWork for a
    damaged file."""
    path = journal.folder / f"{TOKENS}.safetensors"

    def run() -> list[int]:
        tokens = collected
        if tokens is None:
            tokens = collect_tokens(calibration, checkpoint, progress, journal.max_memory)
        save_file({TOKENS: tokens.contiguous()}, path)
        return list(tokens.shape)

    shape = journal.unit(CALIBRATION_TOKENS, run, lambda shape: [f"{shape[0]} windows of {shape[1]}"])
    try:
        tokens: Tensor = load_file(path)[TOKENS].view(shape)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise DamagedWork(f"'{path.name}' of an interrupted run is damaged", journal.folder) from error
    return tokens


def kept_rotations(
    journal: Journal,
    checkpoint: Checkpoint,
    recipe: Recipe,
    tokens: Tensor | None,
    file: Path | None,
    progress: Progress,
) -> Rotations:
    """`choose_rotations`, as a unit; matrices that no seed tells are kept in a file. Raises what it does."""
    spec = checkpoint.spec

    def run() -> dict[str, Any] | None:
        chosen = choose_rotations(checkpoint, recipe, tokens, file, progress)
        if chosen.matrices is None or chosen.choice is None:
            return None
        write_rotations(journal.folder, chosen.matrices)
        return chosen.choice.to_dict()

    choice = journal.unit(ROTATING, run)
    if choice is None:
        return Rotations(plan_rotations(spec, recipe))
    sizes = list_matrix_sizes(spec, recipe)
    matrices = read_rotations(journal.folder / ROTATIONS, sizes)
    words = {key: "none" if getattr(recipe, key) == "none" else "file" for key in ("r1", "r2")}
    kept = replace(recipe, r1=words["r1"], r2=words["r2"])
    plan = plan_rotations(spec, kept, matrices=matrices)
    return Rotations(plan, RotationChoice.from_dict(choice), matrices)
