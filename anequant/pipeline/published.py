"""ANEMLL's published words for a quantization, as recipes; and the lines its log ends in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.checkpoints.reader import read_json
from anequant.errors import UnsupportedError, UsageError, did_you_mean
from anequant.pipeline.quantize import QuantizeResult
from anequant.recipe import Recipe
from anequant.recipe_files import load_recipe

QUAROT, NONE = "quarot", "none"
OPTIMIZATIONS = (QUAROT, NONE)
ROTATED: Mapping[str, Any] = {"r1": "block-hadamard", "r2": "hadamard"}
UNROTATED: Mapping[str, Any] = {"r1": "none", "r2": "none"}

SETTINGS = {"block_size": "r1_block", "seed": "seed"}
"""Keys of a QuaRot file that a recipe has too."""

FIXED: Mapping[str, Any] = {
    "name": QUAROT,
    "online-had": False,
    "backbone": "model",
    "model_decoder_layers": "model.layers",
    "self_attn": "self_attn",
    "mlp": "mlp",
    **{f"{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
"""Keys that have one value here."""

UNUSED = ("override_dtype", "codebook_bits", "search_iters", "lr", "grad_clip", "ortho_loss_weight")
"""Keys of the published search for rotations. Ours are Hadamard matrices, applied in float64."""


@dataclass(frozen=True)
class PublishedRecipe:
    """A recipe, and what the published words asked for that has no effect on it."""

    recipe: Recipe
    notes: tuple[str, ...]


def published_recipe(
    scheme: str, optimization: str, config: Path | None, *, premultiply: bool
) -> PublishedRecipe:
    """`scheme` (a published one or any recipe), rotated as `optimization` and the QuaRot file say.

    Raises UsageError for an unknown scheme, optimization or key, InputError for a file that cannot be
    read, UnsupportedError for a value with no counterpart.
    """
    if optimization not in OPTIMIZATIONS:
        raise UsageError(
            f"unknown optimization '{optimization}'", remedy=did_you_mean(optimization, OPTIMIZATIONS)
        )
    if optimization == NONE and config is not None:
        raise UsageError(f"'{config}' says how to rotate, and the optimization is '{NONE}'")
    values = {} if config is None else _read_config(config)
    overrides = dict(ROTATED if optimization == QUAROT else UNROTATED)
    overrides |= {SETTINGS[key]: value for key, value in values.items() if key in SETTINGS}
    if premultiply:
        overrides["premultiply_scales"] = True
    recipe = load_recipe(scheme, overrides)
    notes = []
    unused = [key for key in values if key in UNUSED]
    if unused:
        notes.append(f"rotations are fixed Hadamard matrices in float64: no use for {', '.join(unused)}")
    if not recipe.calibrated:
        notes.append(f"{scheme} rounds to the nearest: no use for calibration data")
    return PublishedRecipe(recipe, tuple(notes))


def _read_config(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise UsageError(f"QuaRot file '{path}' holds no table of keys and values")
    known = (*SETTINGS, *FIXED, *UNUSED)
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"unknown key '{key}' in '{path}'", remedy=did_you_mean(key, known))
        if key in FIXED and value != FIXED[key]:
            raise UnsupportedError(
                f"key '{key}' in '{path}' is {value!r}", remedy=f"only {FIXED[key]!r} is known"
            )
    return values


def closing_lines(output: Path, result: QuantizeResult) -> list[str]:
    """What ends the published log; a line for every width, the one of most tensors last."""
    widths = Counter(tensor.bits for tensor in result.rounding.tensors)
    counts = sorted(widths.items(), key=lambda item: (item[1], item[0]))
    return [
        f"Quantization complete! Model saved to {output}",
        *(f"Quantized {count} layers with {bits}-bit precision" for bits, count in counts),
    ]
