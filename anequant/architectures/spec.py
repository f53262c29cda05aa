"""What an architecture is: a table that says in which space each axis of each weight lives.

Folding, rotation, the checkpoint's layout and the lowering all read this table. The spaces:

    residual    the stream that embeddings, o and down write and q, k, v, gate, up and the head read
    value       one head of v's output, seen again by every query head of its group in o's input
    query_key   one head of q or k; RoPE acts here, so no offline rotation may
    ffn         gate's and up's output, down's input; the SwiGLU product acts here
    vocab       tokens
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEAD = "lm_head"
INPUT_SCALES = "input_scales"
"""What a linear's input scales are called in a checkpoint, after the linear's name."""


class Space(str, Enum):
    RESIDUAL = "residual"
    VALUE = "value"
    QUERY_KEY = "query_key"
    FFN = "ffn"
    VOCAB = "vocab"


class Window(str, Enum):
    """Which layers look back no further than config.json's sliding_window."""

    NO_LAYER = "no layer"
    EVERY_LAYER = "every layer"
    LISTED_LAYERS = "the layers that layer_types calls sliding_attention"


@dataclass(frozen=True)
class Axis:
    """One axis of a weight: its space, and the ModelSpec attribute that holds its width."""

    space: Space
    width: str


RESIDUAL = Axis(Space.RESIDUAL, "hidden_size")
QUERY = Axis(Space.QUERY_KEY, "query_size")
KEY = Axis(Space.QUERY_KEY, "key_value_size")
VALUE = Axis(Space.VALUE, "key_value_size")
ATTENDED = Axis(Space.VALUE, "query_size")
FFN = Axis(Space.FFN, "intermediate_size")
VOCAB = Axis(Space.VOCAB, "vocab_size")

KEYS = {
    "query_size": ("num_attention_heads", "head_dim"),
    "key_value_size": ("num_key_value_heads", "head_dim"),
}
"""The keys of config.json whose product a width is, where it is not a key itself."""


@dataclass(frozen=True)
class Linear:
    """One linear: y = W x + b with W [output, input].

    `norm` names the RMSNorm whose gain scales the input. `source` names the linear whose output reaches
    the input multiplied or mixed over positions only, so that a factor on one of its rows is a factor on
    the input's coordinate. `bias` is True, False, or the config key that decides.
    """

    name: str
    output: Axis
    input: Axis
    norm: str | None = None
    bias: bool | str = False
    source: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One model_type of transformers.

    `head_norms` are the per-head RMSNorms on q and k (never folded: RoPE follows them);
    `package_prefix` and `head_split` are ANEMLL's file prefix and number of head parts.
    """

    model_type: str
    linears: tuple[Linear, ...]
    head_norms: tuple[str, ...]
    package_prefix: str
    head_split: int
    window: Window


def decoder_layer(
    *, query_key_value_bias: bool | str, output_bias: bool | str, mlp_bias: bool | str
) -> tuple[Linear, ...]:
    """Return the seven projections of a pre-norm decoder layer with grouped-query attention and SwiGLU."""
    attention_norm, mlp_norm = "input_layernorm", "post_attention_layernorm"
    return (
        Linear("self_attn.q_proj", QUERY, RESIDUAL, attention_norm, query_key_value_bias),
        Linear("self_attn.k_proj", KEY, RESIDUAL, attention_norm, query_key_value_bias),
        Linear("self_attn.v_proj", VALUE, RESIDUAL, attention_norm, query_key_value_bias),
        Linear("self_attn.o_proj", RESIDUAL, ATTENDED, None, output_bias, source="self_attn.v_proj"),
        Linear("mlp.gate_proj", FFN, RESIDUAL, mlp_norm, mlp_bias),
        Linear("mlp.up_proj", FFN, RESIDUAL, mlp_norm, mlp_bias),
        Linear("mlp.down_proj", RESIDUAL, FFN, None, mlp_bias, source="mlp.up_proj"),
    )


HEAD_LINEAR = Linear(HEAD, VOCAB, RESIDUAL, FINAL_NORM)


@dataclass(frozen=True)
class ModelSpec:
    """An architecture with the numbers of one checkpoint's config.json.

    `config` is that file as transformers resolves it. `tied`: the head is the embedding.
    """

    architecture: Architecture
    config: Mapping[str, Any]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    tied: bool

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def norms(self) -> tuple[str, ...]:
        """The folded RMSNorms of one layer, in order of use."""
        return tuple(dict.fromkeys(linear.norm for linear in self.architecture.linears if linear.norm))

    @property
    def window(self) -> int | None:
        """How many tokens the layer that sees least looks back over, itself included; None for all."""
        layers, window = self.architecture.window, self.config.get("sliding_window")
        slides = layers is Window.EVERY_LAYER or (
            layers is Window.LISTED_LAYERS and "sliding_attention" in self.config["layer_types"]
        )
        return window if slides else None

    def width(self, axis: Axis) -> int:
        width: int = getattr(self, axis.width)
        return width

    def shape(self, linear: Linear) -> tuple[int, int]:
        return self.width(linear.output), self.width(linear.input)

    @property
    def input_groups(self) -> tuple[tuple[Linear, ...], ...]:
        """The linears of a layer by the input they share, in order of use: q/k/v, o, gate/up, down."""
        groups: dict[str, list[Linear]] = {}
        for linear in self.architecture.linears:
            groups.setdefault(linear.norm or linear.name, []).append(linear)
        return tuple(tuple(group) for group in groups.values())

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers that make this model's shapes."""
        return {
            "layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "heads": self.num_heads,
            "key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
        }

    @property
    def linear_weights(self) -> dict[str, int]:
        """How many weights each linear of a layer has, by name relative to the layer, in order of use."""
        return {linear.name: math.prod(self.shape(linear)) for linear in self.architecture.linears}

    @property
    def layer_weights(self) -> int:
        """How many weights the linears of one layer have together."""
        return sum(self.linear_weights.values())

    def has_bias(self, linear: Linear) -> bool:
        return bool(self.config[linear.bias]) if isinstance(linear.bias, str) else linear.bias

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one float layer's tensors, by name relative to the layer."""
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (self.hidden_size,) for name in self.norms}
        for linear in self.architecture.linears:
            shapes[f"{linear.name}.weight"] = self.shape(linear)
            if self.has_bias(linear):
                shapes[f"{linear.name}.bias"] = (self.width(linear.output),)
        for name in self.architecture.head_norms:
            shapes[f"{name}.weight"] = (self.head_dim,)
        return shapes

    def outer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors outside the layers; a tied head has none of its own."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{EMBEDDING}.weight": (self.vocab_size, self.hidden_size),
            f"{FINAL_NORM}.weight": (self.hidden_size,),
        }
        if not self.tied:
            shapes[f"{HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def keys_of(self, tensor: str) -> tuple[str, ...]:
        """Return the keys of config.json that make the shape of a tensor, by its full name."""
        outer = {EMBEDDING: ("vocab_size", "hidden_size"), HEAD: ("vocab_size", "hidden_size")}
        stem = tensor.rpartition(".")[0]
        if stem in outer:
            return outer[stem]
        for linear in self.architecture.linears:
            if stem.endswith(linear.name):
                widths = linear.output.width, linear.input.width
                return tuple(dict.fromkeys(key for width in widths for key in KEYS.get(width, (width,))))
        return ("head_dim",) if stem.endswith(self.architecture.head_norms) else ("hidden_size",)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all of a float model's tensors by full name."""
        layer = self.layer_tensors()
        layers = {layer_prefix(i) + name: layer[name] for i in range(self.num_layers) for name in layer}
        return {**self.outer_tensors(), **layers}


def layer_prefix(layer: int) -> str:
    """Return the name of a layer's tensors up to and including the dot."""
    return f"model.layers.{layer}."
