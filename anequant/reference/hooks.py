"""`Online` on transformers' own decoder layers: hooks that rotate and round what goes through them.

A linear's input is rotated (R4 at down), then rounded, in hooks that run before it. Keys and values are
rotated and rounded on their way into the cache: the attention module is handed a stand-in for its cache,
which does that and passes them on. Queries are rotated in the attention function, which is otherwise sdpa.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import INPUT_SCALES, ModelSpec, Space, layer_prefix
from anequant.quantization.activations import ActivationFormat, round_activations
from anequant.quantization.kv_cache import round_states
from anequant.quantization.online import Online
from anequant.rotation.orthogonal import Rotation

ATTENTION = "anequant"
ATTENTION_MODULE = "self_attn"
R3 = "anequant_r3"


def attach_all(model: Any, spec: ModelSpec, online: Online) -> None:
    """Make every decoder layer of transformers' model do what `online` says."""
    if online.r3 is not None:
        register_attention()
        model.config._attn_implementation = ATTENTION
    for number, layer in enumerate(model.model.layers if online.active else ()):
        attach(layer, number, spec, online)


def attach(layer: torch.nn.Module, number: int, spec: ModelSpec, online: Online) -> None:
    """Make a decoder layer do what `online` says. `set_input_scale` completes linears that have one."""
    place = _Place()
    for linear in spec.architecture.linears:
        module = layer.get_submodule(linear.name)
        if online.r4 is not None and linear.input.space is Space.FFN:
            module.register_forward_pre_hook(_hook_rotation(online.r4))
        format_ = online.activations.get(layer_prefix(number) + linear.name)
        if format_ is not None:
            module.register_forward_pre_hook(_hook_rounding(format_, online.prefix, place))
    attention = layer.get_submodule(ATTENTION_MODULE)
    if online.r3 is not None:
        setattr(attention, R3, online.r3)
    attention.register_forward_pre_hook(_hook_entry(number, online, place), with_kwargs=True)


def set_input_scale(linear: torch.nn.Module, scale: Tensor | None) -> None:
    """Set the vector [1, in] that multiplies a linear's input before it is rounded, and divides it after."""
    setattr(linear, INPUT_SCALES, scale)


def register_attention() -> None:
    """Make transformers know the attention function that rotates queries."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: torch.nn.Module, query: Tensor, *arguments: Any, **options: Any) -> Any:
        r3: Rotation = getattr(module, R3)
        return sdpa_attention_forward(module, r3.apply(query), *arguments, **options)

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _Place:
    """Where the tokens that a layer is given begin."""

    first = 0


class _RotatingCache:
    """Stands in for a layer's cache during one call: rotates and, unless the cache does that, rounds what is
    added to it."""

    def __init__(self, cache: Any, online: Online, first: int) -> None:
        self._cache = cache
        self._online = online
        self._first = first

    def update(self, keys: Tensor, values: Tensor, layer: int, *arguments: Any, **options: Any) -> Any:
        online, kept = self._online, max(0, self._online.prefix - self._first)
        if online.r3 is not None:
            keys = online.r3.apply(keys)
        if online.kv_bits < 16 and not getattr(self._cache, "rounds_states", False):
            keys, values = (_round_later_states(part, kept, online.kv_bits) for part in (keys, values))
        if self._cache is None:
            return keys, values
        return self._cache.update(keys, values, layer, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _hook_entry(number: int, online: Online, place: _Place) -> Callable[..., Any]:
    def enter(module: torch.nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        cache = options.get("past_key_values")
        place.first = 0 if cache is None else cache.get_seq_length(number)
        if online.r3 is not None or online.kv_bits < 16:
            options = {**options, "past_key_values": _RotatingCache(cache, online, place.first)}
        return arguments, options

    return enter


def _hook_rotation(rotation: Rotation) -> Callable[..., Any]:
    return lambda module, arguments: (rotation.apply(arguments[0]), *arguments[1:])


def _hook_rounding(format_: ActivationFormat, prefix: int, place: _Place) -> Callable[..., Any]:
    def hook(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, kept = arguments[0], max(0, prefix - place.first)
        scale = getattr(module, INPUT_SCALES, None)
        later = x[:, kept:] if kept else x
        if scale is None:
            rounded = round_activations(later, format_)
        else:
            scale = scale.to(x.dtype)
            rounded = round_activations(later * scale, format_) / scale
        if kept:
            rounded = torch.cat([x[:, :kept], rounded], 1)
        return (rounded, *arguments[1:])

    return hook


def _round_later_states(x: Tensor, kept: int, bits: int) -> Tensor:
    """Keys or values [n, heads, tokens, head_dim], the first `kept` tokens as they are."""
    if not kept:
        return round_states(x, bits)
    return torch.cat([x[:, :, :kept], round_states(x[:, :, kept:], bits)], 2)
