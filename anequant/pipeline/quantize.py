"""A float checkpoint becomes a quantized one: the passes in order, and the files beside the weights."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import layer_prefix
from anequant.calibration.distill import TuneResult
from anequant.calibration.sensitivity import rounding_losses
from anequant.calibration.tokens import calibration_tokens
from anequant.checkpoints.layout import checkpoint_entries, projection_names
from anequant.checkpoints.manifest import CHECKPOINT, MANIFEST, manifest, published_config, rotation_keys
from anequant.checkpoints.online import quantized_config, weights_stem
from anequant.checkpoints.output import file_hashes, staged_folder
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.rotations import ROTATIONS, write_rotations
from anequant.checkpoints.source import Source
from anequant.checkpoints.writer import CheckpointWriter, write_json
from anequant.pipeline.quantize_pass import PassResult, QuantizePass
from anequant.pipeline.records import calibration_record, copy_tokenizer, source_record
from anequant.pipeline.rotated import check_rotated, open_float
from anequant.pipeline.rotations import RotationChoice, Rotations, check_rotations, choose_rotations
from anequant.pipeline.tune_pass import tune_checkpoint
from anequant.pipeline.turned import TurnedModel
from anequant.progress import Progress, part_of, silent
from anequant.quantization.mixed import allocate_bits
from anequant.quantization.online import plan_online
from anequant.recipe import Calibration, Recipe
from anequant.rotation.plan import RotationPlan

DEFAULT_CALIBRATION = Calibration()
SENSITIVITY_TOKENS = 128
UNTUNED = "untuned"
UNROTATED: dict[str, Any] = {"r1": "none", "r2": "none", "restarts": 1, "learn": 0}
"""What is left to rotate in a checkpoint that is rotated already."""


@dataclass(frozen=True)
class QuantizeResult:
    """What the passes measured; `tuning` is None without tuning, which comes after `rounding`'s errors.

    `rotated_before`: the source was a rotated checkpoint. `rotations`: how they were found here, None where
    the seed alone tells them.
    """

    rounding: PassResult
    tuning: TuneResult | None
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
) -> QuantizeResult:
    """Write the quantized checkpoint of `source` to the new folder `output`.

    `calibration` says which tokens a calibrated recipe sees, `rotations_file` where an r1 or r2 of file is.
    A source that is rotated already is not rotated again, and the recipe has to say what it was rotated with.

    Raises UsageError when `output` exists (without `force`) or for a recipe that contradicts the source's
    rotations, InputError or UnsupportedError for a model that cannot be read or handled, VerificationError
    when a check fails; nothing is left behind then.
    """
    with staged_folder(output, force=force, source=source.folder) as staging:
        return quantize_into(staging, source, recipe, calibration, progress, rotations_file)


def quantize_into(
    folder: Path,
    source: Source,
    recipe: Recipe,
    calibration: Calibration,
    progress: Progress,
    rotations_file: Path | None = None,
) -> QuantizeResult:
    """As `quantize`, into an existing empty folder."""
    checkpoint = open_float(source)
    spec = checkpoint.spec
    keys = rotation_keys(source.folder)
    if keys is None:
        check_rotations(recipe, rotations_file)
    else:
        check_rotated(checkpoint, keys, recipe, rotations_file)
    online = plan_online(spec, recipe)
    tokens = None
    if (recipe if keys is None else replace(recipe, **UNROTATED)).calibrated:
        tokens = calibration_tokens(calibration, checkpoint, part_of(progress, "calibrate", 0.0, 0.2))
    rotations = Rotations(RotationPlan())
    if keys is None:
        choosing = part_of(progress, "rotations", 0.2, 0.25)
        rotations = choose_rotations(checkpoint, recipe, tokens, rotations_file, choosing)
    model = TurnedModel(checkpoint, rotations.plan, recipe.fold_input_scales, online)
    bits = _projection_bits(model, recipe, tokens, part_of(progress, "sensitivity", 0.25, 0.3))
    entries = checkpoint_entries(spec, recipe, bits)
    written = folder / UNTUNED if recipe.tune else folder
    written.mkdir(exist_ok=True)
    end, stem = 0.5 if recipe.tune else 1.0, weights_stem(online)
    with CheckpointWriter(written, entries, stem=stem) as writer:
        rounding = part_of(progress, "round", 0.3, end)
        errors = QuantizePass(model, recipe, bits, writer, rounding, tokens).run()
    config = quantized_config(spec, recipe, online.with_scales(errors.static_scales), writer.first_file)
    write_json(written / "config.json", config)
    tuning = None
    if recipe.tune:
        with CheckpointWriter(folder, entries, stem=stem) as writer:
            step = part_of(progress, "tune", end, 1.0)
            tuning = tune_checkpoint(written, checkpoint, writer, recipe.tune, calibration, step)
        shutil.rmtree(written)
        write_json(folder / "config.json", config)
    result = QuantizeResult(errors, tuning, rotations.choice, keys is not None)
    if rotations.matrices is not None:
        write_rotations(folder, rotations.matrices)
    elif keys is not None and (source.folder / ROTATIONS).is_file():
        shutil.copyfile(source.folder / ROTATIONS, folder / ROTATIONS)
    _write_side_files(folder, checkpoint, source, recipe, result, calibration, tokens)
    progress("hash", 1.0)
    return result


def _projection_bits(
    model: TurnedModel, recipe: Recipe, tokens: Tensor | None, progress: Progress
) -> dict[str, int]:
    """The width of every projection by full name: the recipe's, or chosen by sensitivity."""
    spec = model.spec
    if not recipe.target_bits or tokens is None:
        return dict.fromkeys(projection_names(spec), recipe.bits)
    losses = rounding_losses(
        spec,
        model.float_layer,
        torch.cat([turned.float() for _, turned in model.head()]),
        model.embed(tokens[:, :SENSITIVITY_TOKENS]),
        online=model.online.rotations,
        widths=recipe.widths,
        codebook=recipe.codebook,
        scales=recipe.linear_scales,
        group=recipe.group_size,
        seed=recipe.seed,
        progress=progress,
    )
    sizes = {
        layer_prefix(layer) + linear.name: math.prod(spec.shape(linear))
        for layer in range(spec.num_layers)
        for linear in spec.architecture.linears
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
    published = published_config(checkpoint.spec, recipe, len(errors.tensors), errors.summary())
    write_json(folder / "quantization_config.json", published)
    copy_tokenizer(source, folder)
    contents = {
        "recipe": recipe.to_dict(),
        "calibration": calibration_record(calibration, tokens),
        "source": source_record(source, checkpoint.files),
        "measured": result.to_dict(),
        "files": file_hashes(folder),
    }
    write_json(folder / MANIFEST, manifest(CHECKPOINT, contents))
