"""A float checkpoint becomes a quantized one: the passes in order, and the files beside the weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import layer_prefix
from anequant.calibration.distill import LearnResult
from anequant.calibration.rotation_choice import RotationChoice, Rotations
from anequant.calibration.sensitivity import FloatModel, measure_rounding_losses
from anequant.checkpoints.layout import list_entries, list_projections
from anequant.checkpoints.manifest import (
    CHECKPOINT,
    build_published_config,
    read_rotation_keys,
    write_manifest,
)
from anequant.checkpoints.online_config import build_config, choose_stem
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.rotation_files import ROTATIONS, write_rotations
from anequant.checkpoints.source import Source
from anequant.checkpoints.writer import CheckpointWriter, write_json
from anequant.jobs.control import CONTROL, Control, Progress, silent, step_of
from anequant.jobs.journal import Journal
from anequant.jobs.resume import resumable
from anequant.outputs.card import Asked, write_checkpoint_card
from anequant.outputs.records import calibration_record, copy_tokenizer, source_record
from anequant.pipeline.fingerprint import fingerprint
from anequant.pipeline.kept import kept_rotations, kept_tokens
from anequant.pipeline.quantize_pass import QuantizePass
from anequant.pipeline.rounder import PassResult
from anequant.pipeline.tune_pass import tune_checkpoint
from anequant.planning.plan import base_of, make_plan
from anequant.planning.requirements import calibrates, check_job
from anequant.planning.schedule import CALIBRATION_TOKENS, SENSITIVITY, TUNING, units_of
from anequant.planning.steps import ROTATING
from anequant.quantization.bit_allocation import allocate_bits
from anequant.quantization.online import plan_online
from anequant.quantization.weight_format import linear_format
from anequant.recipe import Calibration, Recipe
from anequant.reference.judge import check_written
from anequant.reference.open_float import open_float
from anequant.reference.rotated_model import RotatedModel
from anequant.rotation.rotation_plan import RotationPlan

DEFAULT_CALIBRATION = Calibration()
SENSITIVITY_TOKENS = 128
UNTUNED = "untuned"


@dataclass(frozen=True)
class QuantizeResult:
    """What the passes measured; `tuning` is None without tuning, which comes after `rounding`'s errors.

    `rotated_before`: the source was a rotated checkpoint. `rotations`: how they were found here, None where
    the seed alone tells them.
    """

    rounding: PassResult
    tuning: LearnResult | None
    rotations: RotationChoice | None = None
    rotated_before: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.rounding),
            "tuning": None if self.tuning is None else asdict(self.tuning),
            "rotations": None if self.rotations is None else self.rotations.to_dict(),
            "rotated_before": self.rotated_before,
        }


def quantize(
    source: Source,
    output: Path,
    recipe: Recipe,
    calibration: Calibration = DEFAULT_CALIBRATION,
    rotations_file: Path | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
    control: Control = CONTROL,
    collected: Tensor | None = None,
) -> QuantizeResult:
    """Write the quantized checkpoint of `source` to the new folder `output`.

    `calibration` says which tokens a calibrated recipe sees, and `collected` are these where somebody has
    them already; `rotations_file` says where an r1 or r2 of file is.
    A source that is rotated already is not rotated again, and the recipe has to say what it was rotated with.

    Raises UsageError when `output` exists (without `force`), for a recipe that contradicts the source's
    rotations or when another job was interrupted, InputError or UnsupportedError for a model that cannot be
    read or handled, VerificationError when a check fails; nothing is left behind then. See
    `resumable` for what an interrupt and a full disk leave.
    """
    with quantize_job(source, output, recipe, calibration, rotations_file, force, control) as journal:
        return quantize_into(
            journal.output, source, recipe, calibration, progress, journal, rotations_file, collected
        )


def quantize_job(
    source: Source,
    output: Path,
    recipe: Recipe,
    calibration: Calibration,
    rotations_file: Path | None,
    force: bool,
    control: Control,
) -> AbstractContextManager[Journal]:
    """What `resumable` says of a job that is `quantize_into` alone."""
    checkpoint = open_float(source)
    check_job(source, checkpoint, recipe, calibration, rotations_file)
    base = base_of(checkpoint.spec, control.max_memory)
    plan = make_plan(checkpoint, recipe, calibration, None, base, control.max_memory)
    return resumable(
        output,
        fingerprint("quantize", checkpoint, source.name, recipe, calibration, rotations_file),
        needed=plan.disk.total,
        force=force,
        source=source.folder,
        control=control,
        units=units_of(plan.jobs, checkpoint.spec),
    )


def quantize_into(
    folder: Path,
    source: Source,
    recipe: Recipe,
    calibration: Calibration,
    progress: Progress,
    journal: Journal,
    rotations_file: Path | None = None,
    collected: Tensor | None = None,
) -> QuantizeResult:
    """As `quantize`, into a folder of a job's output, of what `open_float` and `check_job` have passed."""
    checkpoint = open_checkpoint(source.folder)
    spec = checkpoint.spec
    keys = read_rotation_keys(source.folder)
    online = plan_online(spec, recipe)
    tokens = None
    if calibrates(source, recipe):
        step = journal.part(progress, "calibrate", CALIBRATION_TOKENS)
        tokens = kept_tokens(journal, calibration, checkpoint, step, collected)
    rotations = Rotations(RotationPlan())
    if keys is None:
        choosing = journal.part(progress, "rotations", ROTATING)
        rotations = kept_rotations(journal, checkpoint, recipe, tokens, rotations_file, choosing)
    model = RotatedModel(checkpoint, rotations.plan, recipe.fold_input_scales, online)
    sensitivity = journal.part(progress, "sensitivity", SENSITIVITY)
    bits = journal.unit(SENSITIVITY, lambda: _projection_bits(model, recipe, tokens, sensitivity))
    entries = list_entries(spec, recipe, bits)
    written = journal.folder / UNTUNED if recipe.tune else folder
    for made in (folder, written):
        made.mkdir(exist_ok=True)
    stem = choose_stem(online)
    with CheckpointWriter(written, entries, stem=stem) as writer:
        rounding = step_of(progress, "round")
        errors = QuantizePass(model, recipe, bits, writer, journal, rounding, tokens).run()
    config = build_config(spec, recipe, online.with_scales(errors.static_scales), writer.first_file)
    write_json(written / "config.json", config)
    tuning = None
    if recipe.tune:
        step = journal.part(progress, "tune", TUNING)

        def tune() -> dict[str, Any]:
            with CheckpointWriter(folder, entries, stem=stem) as writer:
                return asdict(tune_checkpoint(written, checkpoint, writer, recipe.tune, calibration, step))

        tuning = LearnResult(**journal.unit(TUNING, tune, _tuned))
    result = QuantizeResult(errors, tuning, rotations.choice, keys is not None)

    def write_side_files() -> None:
        write_json(folder / "config.json", config)
        if rotations.matrices is not None:
            write_rotations(folder, rotations.matrices)
        elif keys is not None and (source.folder / ROTATIONS).is_file():
            shutil.copyfile(source.folder / ROTATIONS, folder / ROTATIONS)
        _write_side_files(folder, checkpoint, source, recipe, result, calibration, tokens)

    progress("hash", journal.share("checkpoint files")[0])
    journal.unit("checkpoint files", write_side_files)
    check_written(checkpoint, folder)
    return result


def _tuned(result: Mapping[str, float]) -> tuple[str, ...]:
    return (f"held-out KL {result['held_out_before']:.4f} to {result['held_out_after']:.4f}",)


def _projection_bits(
    model: RotatedModel, recipe: Recipe, tokens: Tensor | None, progress: Progress
) -> dict[str, int]:
    """The width of every projection by full name: the recipe's, or chosen by sensitivity."""
    spec = model.spec
    if not recipe.target_bits or tokens is None:
        return dict.fromkeys(list_projections(spec), recipe.bits)
    head = torch.cat([turned.float() for _, turned in model.head()])
    losses = measure_rounding_losses(
        FloatModel(spec, model.float_layer, head, model.online.rotations),
        model.embed(tokens[:, :SENSITIVITY_TOKENS]),
        [linear_format(recipe, bits) for bits in recipe.widths],
        seed=recipe.seed,
        progress=progress,
    )
    sizes = {
        layer_prefix(layer) + name: weights
        for layer in range(spec.num_layers)
        for name, weights in spec.linear_weights.items()
    }
    return allocate_bits(losses, sizes, recipe.target_bits)


def _write_side_files(
    folder: Path,
    checkpoint: Checkpoint,
    source: Source,
    recipe: Recipe,
    result: QuantizeResult,
    calibration: Calibration,
    tokens: Tensor | None,
) -> None:
    errors = result.rounding
    published = build_published_config(checkpoint.spec, recipe, len(errors.tensors), errors.summary())
    write_json(folder / "quantization_config.json", published)
    copy_tokenizer(source, folder)
    seen = calibration_record(calibration, tokens)
    write_checkpoint_card(folder, Asked(source, recipe, calibration), seen)
    contents = {
        "recipe": recipe.to_dict(),
        "calibration": seen,
        "source": source_record(source, checkpoint.files),
        "measured": result.to_dict(),
    }
    write_manifest(folder, CHECKPOINT, contents)
