"""Settings of config.json that change what a layer computes: known to the tables, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anequant.errors import InputError, UnsupportedError, quote

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
"""The types that transformers knows. A length that RoPE changes with is refused where it matters."""

MOST_LAYERS = 10_000
"""transformers lists the type of every layer, so their number is bounded before it does."""

SIZES = {
    "hidden_size": 2**31 - 1,
    "intermediate_size": 2**31 - 1,
    "num_hidden_layers": MOST_LAYERS,
    "num_attention_heads": 2**31 - 1,
    "num_key_value_heads": 2**31 - 1,
    "head_dim": 2**31 - 1,
    "vocab_size": 2**31 - 1,
}
"""The keys that make a model's shapes, and the largest number each may be."""

OTHERS = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "num_experts",
    "num_local_experts",
)
"""What other architectures compute; in a config of these transformers would silently leave it out."""


def check_settings(config: Mapping[str, Any], where: str) -> None:
    """Raises UnsupportedError for a setting or a type of RoPE that no table has, InputError for an impossible
    size and for RoPE settings that are no table."""
    for key in SIZES:
        if config.get(key) is not None:
            check_size(config, key, where)
    if config.get("is_causal") is False:
        raise UnsupportedError(
            "config key 'is_causal' is False, and attention here looks back only", where=where
        )
    for key in OTHERS:
        if config.get(key):
            raise UnsupportedError(
                f"config key '{key}' is {quote(config[key])}, which no known architecture has", where=where
            )
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        if not isinstance(rope, dict):
            raise InputError(f"config key '{key}' is {quote(rope)}, not a table", where=where)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise UnsupportedError(
                f"config key '{key}' asks for RoPE of the unknown type {quote(kind)}",
                where=where,
                remedy=f"known: {', '.join(ROPE_TYPES)}",
            )
    for key, value in (("rope_theta", config.get("rope_theta")), *_thetas(config)):
        if value is not None and not (type(value) in (int, float) and value > 0):
            raise InputError(f"config key '{key}' is {quote(value)}, not a positive number", where=where)


def check_size(config: Mapping[str, Any], key: str, where: str) -> int:
    """Return the number under one of SIZES; raises InputError for what is not a positive whole one, or too
    large."""
    value = config.get(key)
    if type(value) is not int or not 0 < value <= SIZES[key]:
        raise InputError(
            f"config key '{key}' is {quote(value)}, not a whole number from 1 to {SIZES[key]}", where=where
        )
    return value


def _thetas(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rope = config.get("rope_parameters") or {}
    return [("rope_parameters.rope_theta", rope["rope_theta"])] if "rope_theta" in rope else []
