"""A float checkpoint becomes a quantized one: the passes in order, and the files beside the weights."""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import layer_prefix
from anequant.calibration.distill import TuneResult
from anequant.calibration.sensitivity import rounding_losses
from anequant.calibration.tokens import calibration_tokens
from anequant.checkpoints.layout import checkpoint_entries, projection_names
from anequant.checkpoints.manifest import MANIFEST, manifest, published_config
from anequant.checkpoints.online import quantized_config, weights_stem
from anequant.checkpoints.output import file_hashes, staged_folder
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import TOKENIZER_FILES, Source
from anequant.checkpoints.writer import CheckpointWriter, write_json
from anequant.errors import InputError
from anequant.pipeline.quantize_pass import PassResult, QuantizePass
from anequant.pipeline.tune_pass import tune_checkpoint
from anequant.pipeline.turned import TurnedModel
from anequant.progress import Progress, part_of, silent
from anequant.quantization.mixed import allocate_bits
from anequant.quantization.online import plan_online
from anequant.recipe import Calibration, Recipe
from anequant.rotation.plan import plan_rotations

DEFAULT_CALIBRATION = Calibration()
SENSITIVITY_TOKENS = 128
UNTUNED = "untuned"


@dataclass(frozen=True)
class QuantizeResult:
    """What the passes measured; `tuning` is None without tuning, which comes after `rounding`'s errors."""

    rounding: PassResult
    tuning: TuneResult | None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.rounding), "tuning": None if self.tuning is None else asdict(self.tuning)}


def quantize(
    source: Source,
    output: Path,
    recipe: Recipe,
    calibration: Calibration = DEFAULT_CALIBRATION,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> QuantizeResult:
    """Write the quantized checkpoint of `source` to the new folder `output`.

    `calibration` says which tokens a calibrated recipe sees.

    Raises UsageError when `output` exists (without `force`), InputError or UnsupportedError for a model
    that cannot be read or handled, VerificationError when a check fails; nothing is left behind then.
    """
    with staged_folder(output, force=force, source=source.folder) as staging:
        return quantize_into(staging, source, recipe, calibration, progress)


def quantize_into(
    folder: Path, source: Source, recipe: Recipe, calibration: Calibration, progress: Progress
) -> QuantizeResult:
    """As `quantize`, into an existing empty folder."""
    checkpoint = open_checkpoint(source.folder)
    spec = checkpoint.spec
    if checkpoint.is_quantized or checkpoint.online.active:
        reason = "it has output scales" if checkpoint.is_quantized else "it has a quantization_config"
        raise InputError(
            f"'{source.folder}' is already quantized ({reason})",
            remedy="start from the original float checkpoint, or lower this one",
        )
    online = plan_online(spec, recipe)
    model = TurnedModel(checkpoint, plan_rotations(spec, recipe), recipe.fold_input_scales, online)
    tokens = None
    if recipe.calibrated:
        tokens = calibration_tokens(calibration, checkpoint, part_of(progress, "calibrate", 0.0, 0.2))
    bits = _projection_bits(model, recipe, tokens, part_of(progress, "sensitivity", 0.2, 0.3))
    entries = checkpoint_entries(spec, recipe, bits)
    written = folder / UNTUNED if recipe.tune else folder
    written.mkdir(exist_ok=True)
    end, stem = 0.5 if recipe.tune else 1.0, weights_stem(online)
    with CheckpointWriter(written, entries, stem=stem) as writer:
        rounding = part_of(progress, "round", 0.3, end)
        errors = QuantizePass(model, recipe, bits, writer, rounding, tokens).run()
    config = quantized_config(spec, recipe, online.with_scales(errors.static_scales))
    write_json(written / "config.json", config)
    tuning = None
    if recipe.tune:
        with CheckpointWriter(folder, entries, stem=stem) as writer:
            step = part_of(progress, "tune", end, 1.0)
            tuning = tune_checkpoint(written, checkpoint, writer, recipe.tune, calibration, step)
        shutil.rmtree(written)
        write_json(folder / "config.json", config)
    result = QuantizeResult(errors, tuning)
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
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    contents = {
        "recipe": recipe.to_dict(),
        "calibration": _calibration_record(calibration, tokens),
        "source": {
            "name": source.name,
            "revision": source.revision,
            "files": file_hashes(source.folder, checkpoint.files),
        },
        "measured": result.to_dict(),
        "files": file_hashes(folder),
    }
    write_json(folder / MANIFEST, manifest("checkpoint", contents))


def _calibration_record(calibration: Calibration, tokens: Tensor | None) -> dict[str, Any] | None:
    """What the manifest says of the tokens, None for a recipe that needs none; no folder is named.

    The threads belong to it: sums over tokens round differently when more of them share the work.
    """
    if tokens is None:
        return None
    name = Path(calibration.source).name
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    return {
        **asdict(calibration),
        "source": name,
        "windows": len(tokens),
        "tokens_sha256": digest,
        "threads": torch.get_num_threads(),
    }
