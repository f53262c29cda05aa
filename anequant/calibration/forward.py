"""The reference model: transformers' own decoder layers, run one layer at a time.

The model is built on the meta device, so it holds no weights; each layer borrows its tensors from the
checkpoint while it runs. Only the rotary module, which has no weights, is real. Memory is one layer and
the hidden states, whatever the model's size, and every architecture is exact by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, ModelSpec
from anequant.errors import UnsupportedError
from anequant.progress import Progress, silent

WINDOWS_AT_ONCE = 4
HEAD_ROWS = 32768


class Weights(Protocol):
    """What a forward pass reads; a Checkpoint is one."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def head_name(self) -> str: ...
    def read(self, name: str) -> Tensor: ...
    def layer(self, layer: int) -> dict[str, Tensor]: ...
    def final_gain(self) -> Tensor: ...


class ReferenceModel:
    """transformers' model of a ModelSpec, without weights. `dtype` is that of the hidden states."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        config = transformers_config(spec)
        with torch.device("meta"):
            from transformers import AutoModelForCausalLM

            self._model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        self._config = config
        self._dtype = dtype
        self._rotary = type(self._model.model.rotary_emb)(config)

    def rope_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin for positions 0 ... length - 1, each [1, length, head_dim], from the model's module."""
        with torch.no_grad():
            probe = torch.empty(1, dtype=self._dtype)
            cos, sin = self._rotary(probe, torch.arange(length)[None])
        return cos, sin

    def check_window(self, length: int) -> None:
        """Raises UnsupportedError when `length` tokens would need a sliding window."""
        window = getattr(self._config, "sliding_window", None)
        types = getattr(self._config, "layer_types", None)
        slides = types is None or "sliding_attention" in types
        if window is not None and slides and length > window:
            raise UnsupportedError(
                f"{length} tokens exceed the model's sliding window of {window}",
                remedy=f"use a length of at most {window}",
            )

    @torch.no_grad()
    def run_layer(self, layer: int, tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Hidden states [n, length, hidden_size] after decoder layer `layer` with these weights."""
        length = hidden.shape[1]
        self.check_window(length)
        module = self._model.model.layers[layer]
        state = {name: tensor.to(self._dtype) for name, tensor in tensors.items()}
        module.load_state_dict(state, strict=True, assign=True)
        embeddings = self.rope_tables(length)
        positions = torch.arange(length)[None]
        parts = [
            module(part, position_embeddings=embeddings, position_ids=positions, attention_mask=None)
            for part in torch.split(hidden, WINDOWS_AT_ONCE)
        ]
        module.to("meta")
        return torch.cat(parts)

    @torch.no_grad()
    def final_norm(self, hidden: Tensor, gain: Tensor) -> Tensor:
        norm = self._model.model.norm
        norm.load_state_dict({"weight": gain.to(self._dtype)}, assign=True)
        result: Tensor = norm(hidden)
        norm.to("meta")
        return result


def transformers_config(spec: ModelSpec) -> Any:
    """The checkpoint's config as transformers' own class; custom code named in it is never looked at."""
    from transformers import AutoConfig

    values = {key: value for key, value in spec.config.items() if key not in ("model_type", "auto_map")}
    return AutoConfig.for_model(spec.architecture.model_type, **values)


def lowered_rope_tables(spec: ModelSpec, context: int) -> tuple[Tensor, Tensor]:
    """cos and sin [context, head_dim] that hold for every prompt of up to `context` tokens.

    Raises UnsupportedError where RoPE depends on the prompt's length (dynamic and longrope beyond the
    original context), or covers only a part of the head, or attention slides within the context.
    """
    model = ReferenceModel(spec, torch.float32)
    model.check_window(context)
    cos, sin = model.rope_tables(context)
    short = max(1, min(context, 8))
    short_cos, _ = ReferenceModel(spec, torch.float32).rope_tables(short)
    if not torch.equal(short_cos, cos[:, :short]):
        raise UnsupportedError(
            f"this model's RoPE changes with the prompt's length within {context} tokens",
            remedy="choose a context of at most the model's original one",
        )
    if cos.shape[-1] != spec.head_dim:
        raise UnsupportedError(f"RoPE turns {cos.shape[-1]} of {spec.head_dim} coordinates, all are needed")
    return cos[0], sin[0]


def final_hidden_states(
    weights: Weights, tokens: Tensor, dtype: torch.dtype = torch.float32, progress: Progress = silent
) -> Tensor:
    """Normalised hidden states [n, length, hidden_size] for tokens [n, length], layer by layer."""
    model = ReferenceModel(weights.spec, dtype)
    hidden = weights.read(f"{EMBEDDING}.weight")[tokens].to(dtype)
    for layer in range(weights.spec.num_layers):
        progress(f"layer {layer + 1}", layer / weights.spec.num_layers)
        hidden = model.run_layer(layer, weights.layer(layer), hidden)
    return model.final_norm(hidden, weights.final_gain())


def head_logits(head: Tensor, hidden: Tensor) -> Tensor:
    """Logits [..., vocab] of hidden states [..., hidden_size]; the head is widened in row blocks."""
    parts = [hidden @ rows.to(hidden.dtype).T for rows in torch.split(head, HEAD_ROWS)]
    return torch.cat(parts, dim=-1)


def logits(
    weights: Weights, tokens: Tensor, dtype: torch.dtype = torch.float32, progress: Progress = silent
) -> Iterator[Tensor]:
    """Logits [length, vocab] of one window after the other."""
    hidden = final_hidden_states(weights, tokens, dtype, progress)
    head = weights.read(weights.head_name)
    for window in hidden:
        yield head_logits(head, window)
