"""config.json of a quantized checkpoint: plain, and readable by transformers 4 and 5 alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT_ROPE_THETA = 10000.0
DROPPED = ("quantization_config", "auto_map")


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE settings in transformers 5's form, from either generation's config."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("rope_theta", config.get("rope_theta") or DEFAULT_ROPE_THETA)
    return rope


def plain_config(config: Mapping[str, Any], dtype: str = "float16") -> dict[str, Any]:
    """The source's config with an untied head, weights of `dtype` and RoPE in both generations' keys."""
    rope = rope_parameters(config)
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
