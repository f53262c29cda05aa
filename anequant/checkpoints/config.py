"""config.json of a quantized checkpoint: plain, and readable by transformers 4 and 5 alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DROPPED = ("quantization_config", "auto_map")


def plain_config(config: Mapping[str, Any], dtype: str = "float16") -> dict[str, Any]:
    """The source's config, as transformers resolves it, with an untied head, weights of `dtype` and RoPE in
    both generations' keys."""
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
