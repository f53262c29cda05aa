"""LLMC's QuaRot, and GPTQ after it, as runs of anequant.

Step 1 (method Quarot, save_trans) writes the rotated float model to save_path/transformed_model, step 2
(method GPTQ of that folder) the quantized one to save_path/fake_quant_model. Without save_trans a quantized
model is written whether save_fake asks for it or not: LLMC would evaluate it in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from anequant.calibration.tokens import WIKITEXT2
from anequant.checkpoints.manifest import read_rotation_keys
from anequant.checkpoints.reader import read_config
from anequant.checkpoints.source import Source, resolve_source
from anequant.compat.words import LLMC_GPTQ, LLMC_QUAROT, LLMC_REQUIRED, LLMC_WORDS, check_words
from anequant.errors import UnsupportedError, UsageError
from anequant.jobs.control import Progress, Run
from anequant.jobs.work_folder import staged_folder
from anequant.pipeline.quantize import quantize
from anequant.pipeline.quantizing import QuantizeResult, RotateResult
from anequant.pipeline.rotate import rotate
from anequant.recipe import Calibration, Recipe
from anequant.recipe_files import recipe_from_dict
from anequant.request import Request

TRANSFORMED, QUANTIZED = "transformed_model", "fake_quant_model"
SCALES = {"per_channel": "output", "per_group": "group", "per_tensor": "tensor"}


@dataclass(frozen=True)
class LlmcFile:
    """What a file asks for: `values` by dotted key, and `notes` on what has no effect."""

    path: Path
    values: Mapping[str, Any]
    notes: tuple[str, ...]

    def part(self, name: str) -> dict[str, Any]:
        """The keys below quant.`name`, without that prefix."""
        prefix = f"quant.{name}."
        return {
            key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)
        }

    @property
    def rotates(self) -> bool:
        return bool(self.values["quant.method"] == LLMC_QUAROT)

    @property
    def online(self) -> bool:
        """Whether R2 and R4 are wanted beside R1."""
        return bool(self.values.get("quant.special.online_rotate", False))

    @property
    def transforms(self) -> bool:
        """Whether the rotated float model is to be written."""
        return bool(self.values.get("save.save_trans", False))

    @property
    def quantizes(self) -> bool:
        """Whether a quantized model is to be written."""
        return bool(self.values.get("save.save_fake", False)) or not self.transforms


@dataclass(frozen=True)
class LlmcRun:
    """What a file makes of a model: which of the two folders in `output`, how, and what it cannot."""

    source: Source
    output: Path
    recipe: Recipe
    calibration: Calibration
    transforms: bool
    quantizes: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LlmcResult:
    """What was written and measured; None for what was not asked for."""

    rotated: RotateResult | None
    quantized: QuantizeResult | None

    def to_dict(self) -> dict[str, Any]:
        return {
            TRANSFORMED: None if self.rotated is None else self.rotated.to_dict(),
            QUANTIZED: None if self.quantized is None else self.quantized.to_dict(),
        }


def plan_llmc(path: Path) -> LlmcRun:
    """Read a file and the config of the model that it names.

    Raises what `read_llmc` and `resolve_source` raise, and UsageError where file and model disagree or
    calibration is missing.
    """
    file = read_llmc(path)
    source = resolve_source(file.values["model.path"])
    model_type, wanted = read_config(source.folder).get("model_type"), file.values.get("model.type")
    if wanted is not None and wanted.lower() != model_type:
        raise UsageError(f"key 'model.type' in '{path}' is '{wanted}', and the model is a {model_type}")
    keys, notes = make_llmc_recipe(file, read_rotation_keys(source.folder))
    recipe, calibration = recipe_from_dict(keys), make_llmc_calibration(file)
    if calibration is None and recipe.calibrated and file.quantizes:
        raise UsageError(f"'{path}' has no section 'calib', which its method and scales need")
    if calibration is not None and not (recipe.calibrated and file.quantizes):
        notes += ("nothing here is calibrated: no use for calib",)
    output, notes = Path(file.values["save.save_path"]), file.notes + notes
    calibration = calibration or Calibration()
    return LlmcRun(source, output, recipe, calibration, file.transforms, file.quantizes, notes)


def run_llmc(run: LlmcRun, progress: Progress, *, force: bool = False) -> LlmcResult:
    """Write what `run` says to its new folder. Raises as `rotate` and `quantize`; nothing is left then."""
    rotated = quantized = None
    request = Request(run.source, run.recipe, run.calibration)
    with staged_folder(run.output, force=force, source=run.source.folder) as staging:
        if run.transforms:
            step = progress.part("rotate", 0.0, 0.3 if run.quantizes else 1.0)
            rotated = rotate(request, staging / TRANSFORMED, Run(step))
        if run.quantizes:
            step = progress.part("quantize", 0.3 if run.transforms else 0.0, 1.0)
            quantized = quantize(request, staging / QUANTIZED, Run(step))
    return LlmcResult(rotated, quantized)


def make_llmc_recipe(
    file: LlmcFile, rotated_by: Mapping[str, Any] | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the recipe's keys, and notes, for a model that came rotated with keys, or None.

    Raises UsageError where file and model disagree on online rotations, UnsupportedError for values that have
    no counterpart together.
    """
    notes: tuple[str, ...] = ()
    if file.rotates:
        rotations = _rotations(file)
        if file.online:
            notes += ("o_proj's input is turned within heads only: no use for a rotation across heads",)
    else:
        rotations = dict(rotated_by) if rotated_by else {"r1": "none", "r2": "none"}
        if file.online != (rotations.get("r4", "none") != "none"):
            model = "runs R4" if rotated_by and not file.online else "does not run R4"
            raise UsageError(
                f"key 'quant.special.online_rotate' in '{file.path}' is {file.online}, and the model {model}",
                remedy="use what step 1 used",
            )
    weights, more = _weights(file)
    steps = {"correction": 0.0, "descent": 0, "refinement": 0}
    rounding = {"rounding": "nearest"} if file.rotates else {"rounding": "gptq", "hessian": "layer", **steps}
    if not file.quantizes:
        more = ("only the rotated model is written: no use for what quant says of bits",)
    return {**rotations, **weights, **rounding, **_activations(file), **_cache(file)}, notes + more


def make_llmc_calibration(file: LlmcFile) -> Calibration | None:
    """Return the tokens that the section calib names; None without one.

    Raises UnsupportedError for a data set that cannot be downloaded here, UsageError for one not named.
    """
    values = file.values
    if not any(key.startswith("calib.") for key in values):
        return None
    default = Calibration()
    if values.get("calib.download", False):
        source = values.get("calib.name")
        if source != WIKITEXT2:
            raise UnsupportedError(
                f"key 'calib.name' in '{file.path}' is {source!r}, with download",
                remedy=f"only '{WIKITEXT2}' can be downloaded; else name a text or JSON file in calib.path",
            )
    elif "calib.path" not in values:
        raise UsageError(f"key 'calib.path' is missing in '{file.path}'", remedy="or set calib.download")
    else:
        source = values["calib.path"]
    return Calibration(
        (source,),
        samples=values.get("calib.n_samples", default.samples),
        length=values.get("calib.seq_len", default.length),
        seed=values.get("calib.seed", values.get("base.seed", default.seed)),
    )


def _rotations(file: LlmcFile) -> dict[str, Any]:
    online = "hadamard" if file.online else "none"
    return {
        "r1": file.values.get("quant.special.rotate_mode", "hadamard"),
        "r2": online,
        "r4": online,
        "seed": file.values.get("base.seed", 0),
    }


def _weights(file: LlmcFile) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the recipe's keys of weights, and notes. Zero points have no counterpart: where LLMC has them,
    the codebook's entries are free."""
    part = file.part("weight")
    notes: tuple[str, ...] = ()
    scales = SCALES[part.get("granularity", "per_channel")]
    weights: dict[str, Any] = {"bits": part["bit"], "scales": scales}
    if scales == "group":
        weights["group_size"] = part.get("group_size", -1)
    elif part.get("group_size", -1) > 0:
        notes += (f"{part.get('granularity')} scales: no use for quant.weight.group_size",)
    fit, symmetric = part.get("calib_algo", "minmax"), part.get("symmetric", True)
    if symmetric and fit == "mse":
        raise UnsupportedError(
            f"key 'quant.weight.calib_algo' in '{file.path}' is 'mse' for symmetric weights",
            remedy="use minmax, or symmetric: False for a codebook that is fitted",
        )
    weights["codebook"] = "uniform" if symmetric else "lut"
    if not symmetric:
        least = "" if fit == "mse" else ", fitted by least squares"
        notes += (f"weights have a free codebook instead of zero points{least}",)
    return weights, notes


def _activations(file: LlmcFile) -> dict[str, Any]:
    part = file.part("act")
    if not part:
        return {"activation_bits": 16}
    if "bit" not in part:
        raise UsageError(f"key 'quant.act.bit' is missing in '{file.path}'")
    static, symmetric = part.get("static", False), part.get("symmetric", True)
    fit = part.get("calib_algo", "minmax")
    per_tensor = part.get("granularity", "per_token") == "per_tensor"
    problem = {
        "static": static != per_tensor,
        "symmetric": static and not symmetric,
        "calib_algo": not static and fit != "minmax",
    }
    for key, holds in problem.items():
        if holds:
            raise UnsupportedError(
                f"key 'quant.act.{key}' in '{file.path}' is {part.get(key, False)!r}",
                remedy="known are symmetric static per_tensor scales, and minmax dynamic per_token ones",
            )
    return {
        "activation_bits": part["bit"],
        "activation_scales": "static" if static else "dynamic",
        "activation_symmetric": symmetric,
        "activation_range": "mse" if fit == "mse" else "absmax",
    }


def _cache(file: LlmcFile) -> dict[str, Any]:
    part = file.part("kvcache")
    if part and "bit" not in part:
        raise UsageError(f"key 'quant.kvcache.bit' is missing in '{file.path}'")
    return {"kv_bits": part["bit"]} if part else {}


def read_llmc(path: Path) -> LlmcFile:
    """Read and check a file. Raises UsageError for a file that cannot be read, an unknown or missing key or a
    value of a wrong type, UnsupportedError for one that has no counterpart."""
    try:
        tables = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"LLMC file '{path}' cannot be read: {reason}") from error
    if not isinstance(tables, dict):
        raise UsageError(f"LLMC file '{path}' holds no table of keys and values")
    values = _flat(tables, path)
    notes = check_words(values, LLMC_WORDS, path)
    for key in LLMC_REQUIRED:
        if key not in values:
            raise UsageError(f"key '{key}' is missing in '{path}'")
    file = LlmcFile(path, values, notes)
    if file.transforms and not file.rotates:
        raise UnsupportedError(
            f"key 'save.save_trans' in '{path}' is true, and {LLMC_GPTQ} transforms nothing",
            remedy="save_trans is for method Quarot",
        )
    return file


def _flat(values: Mapping[Any, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    """Join nested tables into one, keys joined by dots; raises UsageError for a key without a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if value is None:
            raise UsageError(f"key '{name}' in '{path}' has no value")
        if isinstance(value, dict):
            flat |= _flat(value, path, f"{name}.")
        else:
            flat[name] = value
    return flat
