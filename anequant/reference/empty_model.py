"""transformers' model of a config.json, without weights."""

from __future__ import annotations

import copy
from typing import Any

import torch

from anequant.architectures.config import refusing
from anequant.architectures.spec import ModelSpec


def transformers_config(spec: ModelSpec) -> Any:
    """The checkpoint's config as transformers' own class; custom code named in it is never looked at.

    Raises InputError for values that transformers does not take.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[spec.architecture.model_type]
    values = {key: copy.deepcopy(value) for key, value in spec.config.items() if key != "quantization_config"}
    with refusing("config.json"):
        return config_class.from_dict(values)


def empty_model(spec: ModelSpec) -> tuple[Any, Any]:
    """transformers' model on the meta device, its rotary module real, and its config.

    Raises InputError for a config that transformers makes no model of.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = transformers_config(spec)
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # imports its module
    with refusing("config.json"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model, config
