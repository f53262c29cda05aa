"""A float checkpoint becomes a folded and rotated one, still float: the first of QuaRot's two steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anequant.calibration.rotation_choice import RotationChoice, check_rotations
from anequant.checkpoints.layout import list_entries, list_projections
from anequant.checkpoints.manifest import ROTATED, read_rotation_keys, write_manifest
from anequant.checkpoints.online_config import build_config, choose_stem
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.rotation_files import write_rotations
from anequant.checkpoints.source import Source
from anequant.checkpoints.writer import CheckpointWriter, write_json
from anequant.errors import InputError
from anequant.jobs.control import CONTROL, Control, Progress, silent, step_of
from anequant.jobs.journal import Journal
from anequant.jobs.resume import resumable
from anequant.outputs.card import Asked, write_rotated_card
from anequant.outputs.records import calibration_record, copy_tokenizer, source_record
from anequant.pipeline.fingerprint import fingerprint
from anequant.pipeline.kept import kept_rotations, kept_tokens
from anequant.pipeline.quantize import DEFAULT_CALIBRATION
from anequant.pipeline.quantize_pass import QuantizePass
from anequant.planning.schedule import CALIBRATION_TOKENS, units_of
from anequant.planning.steps import ROTATING, Job, disk, planned_checkpoint, quantizing
from anequant.quantization.online import plan_online
from anequant.recipe import Calibration, Recipe
from anequant.recipe_files import ROTATION_KEYS, recipe_from_dict
from anequant.reference.judge import check_written
from anequant.reference.open_float import open_float
from anequant.reference.rotated_model import RotatedModel

FLOAT = {"bits": 16, "rounding": "nearest"}


@dataclass(frozen=True)
class RotateResult:
    """`equivalence` is the largest relative logit change, in float64; `rotations` says how they were found,
    None where the seed alone tells them."""

    equivalence: float
    rotations: RotationChoice | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "equivalence": self.equivalence,
            "rotations": None if self.rotations is None else self.rotations.to_dict(),
        }


def rotate(
    source: Source,
    output: Path,
    recipe: Recipe,
    calibration: Calibration = DEFAULT_CALIBRATION,
    rotations_file: Path | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
    control: Control = CONTROL,
) -> RotateResult:
    """Write the folded and rotated model of `source` in float32 to the new folder `output`.

    Only what the recipe says of rotations is done; restarts and learning measure them by the quantized model
    that the rest of it describes, on `calibration`'s tokens, as does pca.

    Raises as `quantize`, and InputError for a model that is rotated already.
    """
    checkpoint = open_float(source)
    jobs = _planned(checkpoint, recipe, calibration)
    with resumable(
        output,
        fingerprint("rotate", checkpoint, source.name, recipe, calibration, rotations_file),
        needed=disk(jobs).total,
        force=force,
        source=source.folder,
        control=control,
        units=units_of(jobs, checkpoint.spec),
    ) as journal:
        return _rotate_into(journal.output, source, recipe, calibration, rotations_file, progress, journal)


def _rotate_into(
    folder: Path,
    source: Source,
    recipe: Recipe,
    calibration: Calibration,
    rotations_file: Path | None,
    progress: Progress,
    journal: Journal,
) -> RotateResult:
    checkpoint = open_checkpoint(source.folder)
    if read_rotation_keys(source.folder) is not None:
        raise InputError(
            f"'{source.folder}' is already rotated",
            remedy="quantize it, or start from the original float checkpoint",
        )
    check_rotations(checkpoint.spec, recipe, rotations_file)
    plain = _plain(recipe)
    online = plan_online(checkpoint.spec, plain)
    tokens = None
    if plain.calibrated:
        tokens = kept_tokens(
            journal, calibration, checkpoint, journal.part(progress, "calibrate", CALIBRATION_TOKENS)
        )
    choosing = journal.part(progress, "rotations", ROTATING)
    rotations = kept_rotations(journal, checkpoint, recipe, tokens, rotations_file, choosing)
    model = RotatedModel(checkpoint, rotations.plan, False, online)
    bits = dict.fromkeys(list_projections(checkpoint.spec), 16)
    entries = list_entries(checkpoint.spec, plain, bits, torch.float32)
    with CheckpointWriter(folder, entries, stem=choose_stem(online)) as writer:
        step = step_of(progress, "rotate")
        passed = QuantizePass(model, plain, bits, writer, journal, step, None, torch.float32).run()
    config = build_config(checkpoint.spec, plain, online, writer.first_file, dtype="float32")
    result = RotateResult(passed.equivalence, rotations.choice)

    def write_side_files() -> None:
        write_json(folder / "config.json", config)
        if rotations.matrices is not None:
            write_rotations(folder, rotations.matrices)
        copy_tokenizer(source, folder)
        seen = calibration_record(calibration, tokens)
        write_rotated_card(folder, Asked(source, recipe, calibration), seen, result.equivalence)
        contents = {
            "recipe": {key: getattr(recipe, key) for key in ROTATION_KEYS},
            "calibration": seen,
            "source": source_record(source, checkpoint.files),
            "measured": result.to_dict(),
        }
        write_manifest(folder, ROTATED, contents)

    journal.unit("checkpoint files", write_side_files)
    check_written(checkpoint, folder)
    return result


def _planned(checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration) -> list[Job]:
    """The jobs: those of a recipe that quantizes nothing, but rotations are searched for by the whole one."""
    plain = _plain(recipe)
    written = planned_checkpoint(checkpoint, plain, torch.float32)
    jobs = {
        chosen: {job.name: job for job in quantizing(checkpoint, written, chosen, calibration, 0, None)}
        for chosen in (plain, recipe)
    }
    return [jobs[recipe][name] if name == ROTATING else job for name, job in jobs[plain].items()]


def _plain(recipe: Recipe) -> Recipe:
    """The rotations of a recipe, and nothing quantized."""
    return recipe_from_dict({**{key: getattr(recipe, key) for key in ROTATION_KEYS}, **FLOAT})
