"""The two files beside the weights that say how a checkpoint was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anequant.architectures.spec import ModelSpec
from anequant.checkpoints.reader import Checkpoint, read_json
from anequant.checkpoints.writer import write_json
from anequant.errors import InputError
from anequant.jobs.output_folder import hash_files
from anequant.recipe import Recipe
from anequant.recipe_files import ROTATION_KEYS, load_recipe
from anequant.versions import installed_versions

MANIFEST = "anequant.json"
CHECKPOINT, ROTATED = "checkpoint", "rotated"
"""Kinds of folders: a quantized checkpoint, and a float one that is only folded and rotated."""
FORMAT = 1


def build_published_config(
    spec: ModelSpec, recipe: Recipe, layers_quantized: int, quality: Mapping[str, float]
) -> dict[str, Any]:
    """quantization_config.json: ANEMLL's published keys with true values.

    `layers_quantized` counts what has a codebook; `quality` are measured numbers.
    """
    return {
        "quantization_method": "quarot" if recipe.r1 != "none" else "none",
        "weight_bits": recipe.target_bits or recipe.bits,
        "per_tensor": recipe.scales != "group",
        "rotated": any(kind != "none" for kind in (recipe.r1, recipe.r2, recipe.r3, recipe.r4)),
        "symmetric": recipe.codebook == "uniform",
        "model_type": spec.architecture.model_type,
        "layers_quantized": layers_quantized,
        "block_size": recipe.r1_block if recipe.r1 == "block-hadamard" else None,
        "fusion_applied": True,
        "premultiplied_scales": recipe.premultiply_scales,
        "fusion_metadata": {
            "layernorm_fusions": len(spec.norms) * spec.num_layers + 1,
            "r1": recipe.r1,
            "r2": recipe.r2,
            "r3": recipe.r3,
            "r4": recipe.r4,
            "seed": recipe.seed,
        },
        "quality_metrics": keep_six_digits(quality),
    }


def write_manifest(folder: Path, kind: str, contents: Mapping[str, Any]) -> None:
    """Write the folder's anequant.json: `contents`, the format, the versions that made it, and the hashes of
    all other files.

    Measured numbers are kept to six digits: the last ones depend on how many threads summed them.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    head = {"format": FORMAT, "kind": kind, "versions": installed_versions()}
    own = keep_six_digits({**contents, "files": hash_files(folder)})
    write_json(folder / MANIFEST, {**head, **own})


def hash_checkpoint(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the hashes of a checkpoint's config and weights, which identify it in packages made from it."""
    return hash_files(checkpoint.folder, checkpoint.files)


def keep_six_digits(value: Any) -> Any:
    """Return the value with every float in it rounded to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: keep_six_digits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [keep_six_digits(item) for item in value]
    return value


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the anequant.json of a folder that anequant wrote; raises InputError when there is none."""
    value = read_json(folder / MANIFEST)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f"'{MANIFEST}' is not one this version reads", where=str(folder))
    return value


def read_rotation_keys(folder: Path) -> dict[str, Any] | None:
    """Return the recipe keys that `anequant rotate` rotated the model in a folder with; None for any other
    folder.

    Raises InputError for an anequant.json that is damaged.
    """
    if read_kind(folder) != ROTATED:
        return None
    values = read_manifest(folder).get("recipe")
    if not isinstance(values, dict) or values.keys() != set(ROTATION_KEYS):
        raise InputError(f"'{MANIFEST}' does not tell the rotations", where=str(folder))
    return values


def load_recipe_for(
    folder: Path, recipe: str | Path | Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> Recipe:
    """Load a recipe for the model in `folder`: the keys that `anequant rotate` rotated it with stand in the
    place of the recipe's, not of `overrides`.

    Raises what `load_recipe` and `read_rotation_keys` raise.
    """
    return load_recipe(recipe, {**(read_rotation_keys(folder) or {}), **overrides})


def read_kind(folder: Path) -> str | None:
    """Return the kind of folder that anequant wrote, None for one that it did not."""
    if not (folder / MANIFEST).is_file():
        return None
    return str(read_manifest(folder).get("kind"))
