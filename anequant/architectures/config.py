"""config.json as transformers reads it: the one place where its keys, old and new, get their meaning.

transformers' config class knows which of two spellings wins (rope_scaling over rope_parameters), which keys
a model type obeys (sliding_window only with use_sliding_window) and what a key that is left out means
(Qwen3's head_dim of 128). So it is asked, and no rule of it is repeated here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from anequant.architectures.settings import SIZES, check_size
from anequant.architectures.spec import Architecture, ModelSpec
from anequant.errors import InputError, UnsupportedError, quote

UNREAD = ("auto_map", "quantization_config", "dtype", "torch_dtype", "_name_or_path")
"""Code is never looked at, a quantization is read by `checkpoints.online`, weights have the dtype that they
are stored in, and where a config came from is of no account."""

KEPT = ("quantization_config", "transformers_version")
"""Keys that stay as the file has them: transformers puts its own version there."""


def resolve_config(config: Mapping[str, Any], model_type: str, where: str) -> dict[str, Any]:
    """Return the keys of config.json with the values that transformers gives them, those left out included.

    KEPT and keys that transformers does not know stay as they are. Raises InputError naming the key for
    values that transformers refuses.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    config_class = CONFIG_MAPPING[model_type]
    general = PreTrainedConfig().to_dict().keys()
    given = {key: copy.deepcopy(value) for key, value in config.items() if key not in UNREAD}
    with translate_errors(where):
        resolved = settle_rope(config_class.from_dict(given).to_dict())
    stated = {
        key: value
        for key, value in resolved.items()
        if key not in UNREAD and (key in config or key not in general)
    }
    return {**stated, **{key: config[key] for key in KEPT if key in config}}


def settle_rope(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what transformers has resolved without RoPE's `type`: it has decided between that and
    `rope_type`."""
    rope = {key: value for key, value in resolved["rope_parameters"].items() if key != "type"}
    return {**resolved, "rope_parameters": rope}


@contextmanager
def translate_errors(where: str, what: str = "'config.json'") -> Iterator[None]:
    """Raise InputError for whatever transformers raises about `what`, some of which it checks only by use."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:200]
        raise InputError(
            f"transformers cannot use {what}: {type(cause).__name__}: {reason}", where=where
        ) from error


def build_spec(architecture: Architecture, config: Mapping[str, Any], where: str) -> ModelSpec:
    """Check a config.json that transformers has resolved against the table.

    Raises InputError for an impossible number, UnsupportedError for a setting that the lowering does not
    reproduce.
    """
    activation = config["hidden_act"]
    if activation != "silu":
        raise UnsupportedError(
            f"config key 'hidden_act' is {quote(activation)}, only 'silu' is known", where=where
        )
    sizes = {key: check_size(config, key, where) for key in SIZES if key != "head_dim"}
    hidden_size, num_heads = sizes["hidden_size"], sizes["num_attention_heads"]
    key_value_heads = sizes["num_key_value_heads"]
    if num_heads % key_value_heads:
        raise InputError(
            f"num_key_value_heads {key_value_heads} does not divide num_attention_heads {num_heads}",
            where=where,
        )
    if "head_dim" not in config and hidden_size % num_heads:
        raise InputError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}", where=where
        )
    head_dim = check_size({"head_dim": hidden_size // num_heads, **config}, "head_dim", where)
    if head_dim % 2:
        raise InputError(f"head_dim {head_dim} is odd, RoPE needs pairs", where=where)
    eps = config["rms_norm_eps"]
    if not 0 <= eps < 1:
        raise InputError(
            f"config key 'rms_norm_eps' is {quote(eps)}, not a small positive number", where=where
        )
    return ModelSpec(
        architecture=architecture,
        config=config,
        hidden_size=hidden_size,
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=num_heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=sizes["vocab_size"],
        rms_norm_eps=eps,
        tied=config["tie_word_embeddings"],
    )
