"""The published QuaRot with runtime hooks, as a recipe; the name and the files of what it writes.

That system rotates every linear by itself, by the PCA of its inputs, and has the model multiply by these
matrices while it runs; activations and cache stay in float. Here one R1 and one R2 per layer go into the
weights, R3 and R4 run where small numbers need them, and what the name says is what the model does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.architectures.spec import Space
from anequant.checkpoints.manifest import MANIFEST, read_manifest
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.rotation_files import ROTATIONS, write_rotations
from anequant.checkpoints.source import Source
from anequant.checkpoints.writer import write_json
from anequant.errors import UnsupportedError
from anequant.jobs.control import Progress, Run
from anequant.jobs.output_folder import hash_files
from anequant.jobs.step import Step
from anequant.pipeline.quantize import quantize
from anequant.pipeline.quantizing import QuantizeResult, Quantizing
from anequant.recipe import Calibration, Recipe
from anequant.recipe_files import recipe_from_dict
from anequant.request import Request
from anequant.rotation.rotation_plan import plan_rotations

METHOD, NAME = "quarot", "QuaRot"
ROTATION_METHODS = ("pca", "hadamard")
CONFIG, METADATA, RUNTIME = "quarot_config.json", "quantization_metadata.json", "quarot_runtime.py"
HEAD = "fp16"
UNTAGGED = (8, 16)
"""Bits of activations and cache that the name leaves out."""

RUNTIME_CODE = '''"""Opens the model that lies beside this file, with its rotations, activations and cache."""


def load_quarot_model(path, model=None):
    """The model in the folder `path`; `model`, if given, is what it stands in for: it gets its device."""
    import anequant

    loaded = anequant.load(path)
    return loaded if model is None else loaded.to(model.device)
'''


def make_hooked_recipe(
    method: str,
    *,
    bits: int,
    acts_bits: int,
    kv_bits: int,
    group_size: int,
    rotation_method: str,
    seed: int,
) -> Recipe:
    """Return a recipe of symmetric weights in groups, rounded to the nearest, dynamic activations, and R3 and
    R4 where they serve.

    Raises UnsupportedError for another method, UsageError for a number that no recipe may have.
    """
    if method != METHOD:
        raise UnsupportedError(f"method '{method}' is not known here", remedy=f"only '{METHOD}' is")
    if rotation_method not in ROTATION_METHODS:
        known = " or ".join(ROTATION_METHODS)
        raise UnsupportedError(f"rotation method '{rotation_method}' is not known", remedy=f"use {known}")
    return recipe_from_dict(
        {
            "r1": rotation_method,
            "r2": "hadamard",
            "r3": "hadamard" if kv_bits < 16 else "none",
            "r4": "hadamard" if acts_bits < 16 else "none",
            "seed": seed,
            "codebook": "uniform",
            "scales": "group",
            "group_size": group_size,
            "rounding": "nearest",
            "bits": bits,
            "activation_bits": acts_bits,
            "kv_bits": kv_bits,
        }
    )


def quant_tag(recipe: Recipe) -> str:
    """Return a name such as QuaRot_w4_g64_a4_kv4_headfp16; 8 and 16 bits of activations and cache are left
    out."""
    small = {"a": recipe.activation_bits, "kv": recipe.kv_bits}
    parts = [f"{label}{bits}" for label, bits in small.items() if bits not in UNTAGGED]
    return "_".join([NAME, f"w{recipe.bits}", f"g{recipe.group_size}", *parts, f"head{HEAD}"])


def quantize_hooked(
    source: Source,
    destination: Path,
    recipe: Recipe,
    calibration: Calibration,
    progress: Progress,
    *,
    force: bool = False,
) -> tuple[Path, QuantizeResult]:
    """Quantize into the new folder {base}_{tag} of `destination`, the published files beside the weights.

    Returns that folder. Raises as `quantize` does; nothing is left behind then.
    """
    output = destination / f"{source.name}_{quant_tag(recipe)}"
    request = Request(source, recipe, calibration)
    result = quantize(request, output, Run(progress, force=force), [WriteHooks(output.name)])
    return output, result


@dataclass(frozen=True, eq=False)
class WriteHooks(Step[Quantizing, None]):
    """Write the published files beside the weights of the folder that will be called `name`."""

    stage = "quantize"
    kind = "published files"

    name: str

    def run(self, state: Quantizing, progress: Progress) -> None:
        folder, recipe = state.folder, state.recipe
        checkpoint = open_checkpoint(folder)
        if not (folder / ROTATIONS).is_file():
            write_rotations(folder, plan_rotations(checkpoint.spec, recipe).matrices())
        made = read_manifest(folder)
        write_json(
            folder / CONFIG, {**_settings(made), "rotation_matrices": _describe_rotations(checkpoint, recipe)}
        )
        write_json(folder / METADATA, _metadata(made, self.name, checkpoint.online.active))
        (folder / RUNTIME).write_text(RUNTIME_CODE, encoding="utf-8")
        files = {name: digest for name, digest in hash_files(folder).items() if name != MANIFEST}
        write_json(folder / MANIFEST, {**made, "files": files})


def _settings(made: dict[str, Any]) -> dict[str, Any]:
    """Return what both published files say, from the folder's own manifest."""
    recipe, calibration, tensors = made["recipe"], made["calibration"], made["measured"]["tensors"]
    return {
        "method": NAME,
        "weights_bits": recipe["bits"],
        "activations_bits": recipe["activation_bits"],
        "kv_cache_bits": recipe["kv_bits"],
        "group_size": recipe["group_size"],
        "rotation_method": recipe["r1"],
        "rotations": ROTATIONS,
        "calibration_samples": 0 if calibration is None else calibration["windows"],
        "quantized_layers": len(tensors),
        "seed": recipe["seed"],
    }


def _metadata(made: dict[str, Any], name: str, online: bool) -> dict[str, Any]:
    calibration = made["calibration"]
    return {
        **_settings(made),
        "symmetric": True,
        "per_channel": False,
        "lm_head_dtype": HEAD,
        "backend": "anequant",
        "calibration": None
        if calibration is None
        else {
            "size": calibration["windows"],
            "source": calibration["source"],
            "hash": calibration["tokens_sha256"],
            "seed": calibration["seed"],
        },
        "quant_tag": quant_tag(Recipe(**made["recipe"])),
        "source_model": made["source"]["name"],
        "destination": name,
        "requires_runtime_hooks": online,
        "runtime_module": RUNTIME,
    }


def _describe_rotations(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return, for every linear of a layer, its input's rotation and how its weight is stored."""
    spec = checkpoint.spec
    rotated = {Space.RESIDUAL: ("r1", spec.hidden_size), Space.VALUE: ("r2", spec.head_dim)}
    if recipe.r4 != "none":
        rotated[Space.FFN] = ("r4", spec.intermediate_size)
    return {
        linear.name: {
            "has_rotation": linear.input.space in rotated,
            "rotation": rotated[linear.input.space][0] if linear.input.space in rotated else None,
            "rotation_shape": [rotated[linear.input.space][1]] * 2 if linear.input.space in rotated else None,
            "weight_bits": recipe.bits,
            "group_size": recipe.group_size,
        }
        for linear in spec.architecture.linears
    }
