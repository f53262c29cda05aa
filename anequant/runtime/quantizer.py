"""What makes transformers open a checkpoint that is more than its weights: `quant_method` "anequant".

The weights load as they are, and the input scales beside them. What the model does while it runs is attached
to its layers. transformers looks for the weights where `quantization_config` says they are; without this
quantizer it finds none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from anequant.architectures import read_spec
from anequant.architectures.spec import INPUT_SCALES, ModelSpec, layer_prefix
from anequant.checkpoints.online_config import METHOD, WEIGHTS, read_online
from anequant.errors import InputError, UsageError
from anequant.quantization.online import Online
from anequant.reference.hooks import ATTENTION, attach, register_attention

SDPA = "sdpa"


@register_quantization_config(METHOD)
class AnequantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The values of config.json's quantization_config, as they are."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


@register_quantizer(METHOD)
class AnequantQuantizer(HfQuantizer):  # type: ignore[misc]
    """Turns a model that transformers has built into the one that was quantized."""

    is_trainable = False

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the files before they are looked for, and the attention function that turns queries.

        Raises InputError for a broken quantization_config, UsageError for an attention function that cannot
        turn queries.
        """
        online = read_model_online(config)
        config.transformers_weights = _weights_file(config)
        if online.r3 is not None:
            asked = config._attn_implementation
            if asked not in (None, SDPA, ATTENTION):
                raise UsageError(
                    f"attention '{asked}' cannot turn queries", remedy=f"use attn_implementation='{SDPA}'"
                )
            register_attention()
            config._attn_implementation = ATTENTION
        return config

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **options: Any
    ) -> None:
        spec, online = read_model_spec(model.config), read_model_online(model.config)
        stored = _names(checkpoint_files or [])
        for number, layer in enumerate(model.base_model.layers):
            for linear in spec.architecture.linears:
                name = layer_prefix(number) + linear.name
                if name in online.activations and f"{name}.{INPUT_SCALES}" in stored:
                    scale = torch.empty(1, spec.width(linear.input))
                    layer.get_submodule(linear.name).register_buffer(INPUT_SCALES, scale)
            attach(layer, number, spec, online)


def read_model_spec(config: Any) -> ModelSpec:
    """Read a ModelSpec from transformers' config object."""
    return read_spec(config.to_dict(), _place(config))


def read_model_online(config: Any) -> Online:
    """Read what a model does while it runs from transformers' config object."""
    return read_online(config.to_dict(), read_model_spec(config), _place(config))


def _place(config: Any) -> str:
    return str(Path(config.name_or_path) / "config.json")


def _weights_file(config: Any) -> str:
    file = config.quantization_config.to_dict().get(WEIGHTS)
    if not isinstance(file, str) or Path(file).name != file:
        raise InputError("quantization_config does not name the weights' file", where=_place(config))
    return file


def _names(files: list[str]) -> set[str]:
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return names
