"""transformers' model of a config.json, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from anequant.architectures.spec import ModelSpec
from anequant.errors import InputError


def transformers_config(spec: ModelSpec) -> Any:
    """The checkpoint's config as transformers' own class; custom code named in it is never looked at.

    Raises InputError for values that transformers does not take.
    """
    from transformers import AutoConfig

    dropped = ("model_type", "auto_map", "quantization_config")
    values = {key: value for key, value in spec.config.items() if key not in dropped}
    with _refusing("config.json"):
        return AutoConfig.for_model(spec.architecture.model_type, **values)


def empty_model(spec: ModelSpec) -> tuple[Any, Any]:
    """transformers' model on the meta device, its rotary module real, and its config.

    Raises InputError for a config that transformers makes no model of.
    """
    from transformers import AutoModelForCausalLM

    config = transformers_config(spec)
    with _refusing("config.json"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model, config


@contextmanager
def _refusing(file: str) -> Iterator[None]:
    """InputError for whatever transformers raises: of values that others wrote, it checks some by use."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"transformers cannot use '{file}': {type(error).__name__}: {reason}") from error
