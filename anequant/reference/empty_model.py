"""transformers' model of a config.json, without weights, and weights lent to it while they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from anequant.architectures.config import translate_errors
from anequant.architectures.spec import ModelSpec


def build_transformers_config(spec: ModelSpec) -> Any:
    """Return the checkpoint's config as transformers' own class; custom code named in it is never looked at.

    Raises InputError for values that transformers does not take.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[spec.architecture.model_type]
    values = {key: copy.deepcopy(value) for key, value in spec.config.items() if key != "quantization_config"}
    with translate_errors("config.json"):
        return config_class.from_dict(values)


def build_empty_model(spec: ModelSpec) -> tuple[Any, Any]:
    """transformers' model on the meta device, its rotary module real, and its config.

    Raises InputError for a config that transformers makes no model of.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = build_transformers_config(spec)
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # imports its module
    with translate_errors("config.json"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model, config


class OnDemand(Mapping[str, Tensor]):
    """Tensors by name, each made whenever it is asked for and kept by nobody here."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def borrow(
    linear: torch.nn.Module, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype
) -> list[RemovableHandle]:
    """Give a linear on the meta device its weight and bias, `name`.weight and `name`.bias of `tensors`, in
    `dtype` when it runs, and take them away after it."""
    arrive = linear.register_forward_pre_hook(partial(_arrive, tensors, name, dtype))
    return [arrive, linear.register_forward_hook(_leave)]


def _arrive(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, linear: torch.nn.Module, arguments: Any
) -> None:
    keys = [key for key in ("weight", "bias") if f"{name}.{key}" in tensors]
    linear.load_state_dict({key: tensors[f"{name}.{key}"].to(dtype) for key in keys}, assign=True)


def _leave(linear: torch.nn.Module, arguments: Any, output: Any) -> None:
    linear.to("meta")
