"""`Online` in config.json: the quantization_config of a checkpoint that is more than its weights.

Stock transformers ignores a quantization method that it does not know, and would run the weights as if
nothing were missing. So the weights of such a checkpoint are not called model.safetensors: without
`import anequant` transformers finds none, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anequant.architectures.spec import ModelSpec
from anequant.errors import InputError, UsageError, quote
from anequant.quantization.online import NOTHING, Online, plan_online
from anequant.recipe import Recipe
from anequant.recipe_files import recipe_from_dict

METHOD = "anequant"
ANEMLL_METHOD = "quarot"
"""ANEMLL's script's; transformers does not know it and passes over it, and tensors tell what is quantized."""

FORMAT = 1
STEM, ONLINE_STEM = "model", "anequant"
"""What the weight files' names begin with."""

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
WEIGHTS = "weights"
"""The key that names the file to open first: the weights, or their index."""

KEYS = (
    "r3",
    "r4",
    "r4_block",
    "activation_bits",
    "activation_overrides",
    "activation_scales",
    "activation_symmetric",
    "activation_clip",
    "activation_prefix",
    "kv_bits",
)


def choose_stem(online: Online) -> str:
    return ONLINE_STEM if online.active else STEM


def build_config(
    spec: ModelSpec, recipe: Recipe, online: Online, weights: str, dtype: str = "float16"
) -> dict[str, Any]:
    """config.json of what `recipe` makes of a model; `weights` is the file to open first, `dtype` theirs.

    quantization_config, only where `online` is active, holds the recipe's online choices, and the static
    scales by the linear's name.
    """
    config = build_plain_config(spec.config, dtype)
    if not online.active:
        return config
    scales = {name: format_.scale for name, format_ in online.activations.items() if format_.scale}
    chosen = {key: value for key, value in recipe.to_dict().items() if key in KEYS}
    method = {"quant_method": METHOD, "format": FORMAT, WEIGHTS: weights, **chosen, "static_scales": scales}
    return {**config, "quantization_config": method}


def read_online(config: Mapping[str, Any], spec: ModelSpec, where: str) -> Online:
    """Read `Online` from config.json: NOTHING without a quantization_config, or with ANEMLL's.

    Raises InputError for any other method or format, or values that are missing or impossible.
    """
    values = config.get("quantization_config")
    if values is None:
        return NOTHING
    method = values.get("quant_method", "unknown") if isinstance(values, dict) else "unknown"
    if method == ANEMLL_METHOD:
        return NOTHING
    if method != METHOD:
        raise InputError(
            f"'{Path(where).parent}' is already quantized (quantization_config: {quote(method)})",
            where=where,
            remedy="start from the original float checkpoint",
        )
    if values.get("format") != FORMAT or not isinstance(values.get("static_scales"), dict):
        raise InputError("quantization_config is not one that this version reads", where=where)
    try:
        recipe = recipe_from_dict({key: values[key] for key in KEYS if key in values})
        online = plan_online(spec, recipe)
    except UsageError as error:
        raise InputError(f"quantization_config: {error.what}", where=where) from error
    if not recipe.static_activations:
        return online
    scales = values["static_scales"]
    for name in online.activations:
        if not isinstance(scales.get(name), float) or not 0 < scales[name] < float("inf"):
            raise InputError(f"quantization_config has no static scale for '{name}'", where=where)
    return online.with_scales(scales)


DROPPED = ("quantization_config", "auto_map")


def build_plain_config(config: Mapping[str, Any], dtype: str = "float16") -> dict[str, Any]:
    """Return the source's config, as transformers resolves it, with an untied head, weights of `dtype` and
    RoPE in both generations' keys."""
    rope = config["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        **{key: value for key, value in config.items() if key not in DROPPED},
        "tie_word_embeddings": False,
        "dtype": dtype,
        "torch_dtype": dtype,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }
