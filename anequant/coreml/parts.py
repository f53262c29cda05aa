"""The three parts of a model as Core ML programs: embeddings, decoder chunks, head.

Inputs, outputs, functions and the state are ANEMLL's, so its runtimes run the packages unchanged
(H hidden size, C context, B prefill batch, V vocab):

    embeddings  input_ids int32 [1, 1] or [1, B]                      hidden_states [1, S, H]
    chunk       hidden_states [1, S, H], position_ids int32 [S],      output_hidden_states [1, S, H]
                causal_mask [1, 1, S, C], current_pos int32 [1],
                state (2 * layers, kv heads, C, head_dim)
    head        hidden_states [1, 1, H]                               logits1 ... N [1, 1, V / N]

A chunk has two functions over one state and one copy of the weights: `infer` (S = 1) and `prefill`
(S = B). Only the last chunk's `infer` ends in the final norm, and its `prefill` returns one position,
because after prefill only the state matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, HEAD, ModelSpec, layer_prefix
from anequant.coreml.program import (
    Var,
    attention,
    finite_mask,
    float16_constant,
    float_linear,
    head_part,
    identifier,
    linear,
    packed_codes,
    palettized,
    rms_norm,
    rope_factors,
    rotate_positions,
    state_row,
    write_state,
)
from anequant.coreml.toolkit import TARGET, Function, Program, ct, get_new_symbol, mb, types
from anequant.quantization.linear import QuantizedLinear

STATE = "model_model_kv_cache_0"
INFER, PREFILL = "infer", "prefill"


@dataclass(frozen=True)
class Layer:
    """A decoder layer as the lowering needs it: linears and norm gains by name relative to the layer."""

    index: int
    linears: Mapping[str, QuantizedLinear]
    gains: Mapping[str, Tensor]


@dataclass(frozen=True)
class Geometry:
    """Sizes that are fixed in the packages; cos and sin are float tables [context, head_dim]."""

    spec: ModelSpec
    context: int
    batch: int
    cos: Tensor
    sin: Tensor


def embeddings_program(table: QuantizedLinear | Tensor, batch: int) -> Program:
    """Token ids to hidden states: a gather from a float16 [V, H] or palettized table."""
    length = get_new_symbol()
    tokens = mb.placeholder((1, length), dtype=types.int32)
    with Function({"input_ids": tokens}, opset_version=TARGET) as function:
        ids = function.inputs["input_ids"]
        name = identifier(EMBEDDING)
        if isinstance(table, QuantizedLinear):
            weight = palettized(packed_codes(table), table.codebook, name, name)
            rows = mb.gather(x=weight, indices=ids, axis=0, validate_indices=False, name=f"{name}_rows")
            scales = float16_constant(table.output_scale, (len(table.output_scale), 1), f"{name}_scales")
            scale = mb.gather(x=scales, indices=ids, axis=0, validate_indices=False, name=f"{name}_row_scale")
            hidden = mb.mul(x=rows, y=scale, name="hidden_states")
        else:
            weight = float16_constant(table, tuple(table.shape), f"{name}_weight")
            hidden = mb.gather(x=weight, indices=ids, axis=0, validate_indices=False, name="hidden_states")
        function.set_outputs([hidden])
    shapes = ct.EnumeratedShapes([[1, 1], [1, batch]], default=[1, 1])
    function.input_types = [ct.TensorType("input_ids", shape=shapes, dtype=np.int32)]
    return _program({"main": function})


def chunk_program(geometry: Geometry, layers: Sequence[Layer], final_gain: Tensor | None) -> Program:
    """Some consecutive layers with `infer` and `prefill`; `final_gain` marks the last chunk."""
    codes = {
        _linear_name(layer, name): packed_codes(quantized)
        for layer in layers
        for name, quantized in layer.linears.items()
    }
    functions = {
        INFER: _chunk_function(geometry, layers, codes, 1, final_gain, last_rows=False),
        PREFILL: _chunk_function(
            geometry, layers, codes, geometry.batch, None, last_rows=final_gain is not None
        ),
    }
    return _program(functions)


def head_program(spec: ModelSpec, head: QuantizedLinear | Tensor, parts: int) -> Program:
    """Final hidden state to logits, in `parts` equal convolutions."""
    rows = spec.vocab_size // parts
    with Function(
        {"hidden_states": mb.placeholder((1, 1, spec.hidden_size), dtype=types.fp16)}, opset_version=TARGET
    ) as function:
        x = _to_channels(function.inputs["hidden_states"])
        outputs = []
        name = identifier(HEAD)
        codes = packed_codes(head) if isinstance(head, QuantizedLinear) else None
        for part in range(parts):
            rows_of_part = slice(part * rows, (part + 1) * rows)
            label = head_part(part + 1)
            if isinstance(head, QuantizedLinear):
                assert codes is not None
                piece = QuantizedLinear(
                    head.codes[rows_of_part],
                    head.codebook,
                    head.input_scale,
                    head.output_scale[rows_of_part],
                )
                y = linear(x, piece, codes[rows_of_part], label, name)
            else:
                y = float_linear(x, head[rows_of_part], label)
            outputs.append(mb.reshape(x=y, shape=[1, 1, rows], name=f"logits{part + 1}"))
        function.set_outputs(outputs)
    return _program({"main": function})


def _chunk_function(
    geometry: Geometry,
    layers: Sequence[Layer],
    codes: Mapping[str, np.ndarray[Any, Any]],
    length: int,
    final_gain: Tensor | None,
    *,
    last_rows: bool,
) -> Function:
    spec = geometry.spec
    cache_shape = (2 * spec.num_layers, spec.num_key_value_heads, geometry.context, spec.head_dim)
    inputs = {
        "hidden_states": mb.placeholder((1, length, spec.hidden_size), dtype=types.fp16),
        "position_ids": mb.placeholder((length,), dtype=types.int32),
        "causal_mask": mb.placeholder((1, 1, length, geometry.context), dtype=types.fp16),
        "current_pos": mb.placeholder((1,), dtype=types.int32),
        STATE: mb.state_tensor_placeholder(cache_shape, dtype=types.fp16),
    }
    with Function(inputs, opset_version=TARGET) as function:
        builder = _LayerBuilder(geometry, function.inputs, codes, length)
        x = _to_channels(function.inputs["hidden_states"])
        for layer in layers:
            x = builder.add_layer(x, layer)
        if final_gain is not None:
            x = rms_norm(x, final_gain, spec.rms_norm_eps, 1, "final_norm")
        if last_rows:
            x = mb.slice_by_index(x=x, begin=[0, 0, 0, 0], end=[1, spec.hidden_size, 1, 1], name="first_row")
        x = mb.squeeze(x=x, axes=[2], name="flat_output")
        function.set_outputs([mb.transpose(x=x, perm=[0, 2, 1], name="output_hidden_states")])
    return function


class _LayerBuilder:
    """Emits layers into the open function; holds what all of them share."""

    def __init__(
        self,
        geometry: Geometry,
        inputs: Mapping[str, Var],
        codes: Mapping[str, np.ndarray[Any, Any]],
        length: int,
    ) -> None:
        spec = geometry.spec
        self._spec = spec
        self._codes = codes
        self._length = length
        self._group = spec.num_heads // spec.num_key_value_heads
        self._mask = finite_mask(inputs["causal_mask"], self._group)
        self._cos, self._sin = rope_factors(geometry.cos, geometry.sin, inputs["position_ids"])
        self._start = inputs["current_pos"]
        self._end = mb.add(x=self._start, y=np.array([length], np.int32), name="end_pos")
        self._state = inputs[STATE]
        self._cache = mb.read_state(input=self._state, name="cache")

    def add_layer(self, x: Var, layer: Layer) -> Var:
        """(1, hidden, 1, S) after one pre-norm decoder layer."""
        prefix = _layer_name(layer)
        attention_norm, mlp_norm = self._spec.norms
        normed = self._norm(x, layer, attention_norm)
        x = mb.add(x=x, y=self._attend(normed, layer), name=f"{prefix}_after_attention")
        normed = self._norm(x, layer, mlp_norm)
        gate = mb.silu(x=self._linear(normed, layer, "mlp.gate_proj"), name=f"{prefix}_gate")
        gated = mb.mul(x=gate, y=self._linear(normed, layer, "mlp.up_proj"), name=f"{prefix}_gated")
        return mb.add(x=x, y=self._linear(gated, layer, "mlp.down_proj"), name=f"{prefix}_output")

    def _attend(self, normed: Var, layer: Layer) -> Var:
        spec, prefix, length = self._spec, _layer_name(layer), self._length
        heads, kv_heads, head_dim = spec.num_heads, spec.num_key_value_heads, spec.head_dim
        query = self._rotated(normed, layer, "self_attn.q", heads)
        query = mb.mul(x=query, y=np.float16(head_dim**-0.5), name=f"{prefix}_query_scaled")
        key = self._rotated(normed, layer, "self_attn.k", kv_heads)
        value = self._heads(self._linear(normed, layer, "self_attn.v_proj"), kv_heads, f"{prefix}_value")

        value_row = spec.num_layers + layer.index
        for row, new, name in ((layer.index, key, f"{prefix}_key"), (value_row, value, f"{prefix}_value")):
            by_position = mb.transpose(x=new, perm=[0, 1, 3, 2], name=f"{name}_by_position")
            self._cache = write_state(
                self._state, self._cache, row, by_position, self._start, self._end, name
            )
        keys = state_row(self._cache, layer.index, f"{prefix}_keys")
        values = state_row(self._cache, value_row, f"{prefix}_values")

        query = mb.transpose(x=query, perm=[0, 1, 3, 2], name=f"{prefix}_query_by_position")
        grouped = [1, kv_heads, self._group * length, head_dim]
        query = mb.reshape(x=query, shape=grouped, name=f"{prefix}_query_grouped")
        attended = attention(query, keys, values, self._mask, prefix)
        attended = mb.reshape(x=attended, shape=[1, heads, length, head_dim], name=f"{prefix}_attended_heads")
        attended = mb.transpose(x=attended, perm=[0, 1, 3, 2], name=f"{prefix}_attended_by_channel")
        flat = mb.reshape(x=attended, shape=[1, heads * head_dim, 1, length], name=f"{prefix}_attended_flat")
        return self._linear(flat, layer, "self_attn.o_proj")

    def _rotated(self, normed: Var, layer: Layer, side: str, heads: int) -> Var:
        """q or k as (1, heads, head_dim, S): projected, normalised where the model does, then RoPE."""
        name = f"{_layer_name(layer)}_{identifier(side)}"
        x = self._heads(self._linear(normed, layer, f"{side}_proj"), heads, name)
        gain = layer.gains.get(f"{side}_norm")
        if gain is not None:
            x = rms_norm(x, gain, self._spec.rms_norm_eps, 2, f"{name}_norm")
        return rotate_positions(x, self._cos, self._sin, name)

    def _heads(self, x: Var, heads: int, name: str) -> Var:
        return mb.reshape(x=x, shape=[1, heads, self._spec.head_dim, self._length], name=f"{name}_heads")

    def _norm(self, x: Var, layer: Layer, norm: str) -> Var:
        name = f"{_layer_name(layer)}_{norm}"
        return rms_norm(x, layer.gains[norm], self._spec.rms_norm_eps, 1, name)

    def _linear(self, x: Var, layer: Layer, name: str) -> Var:
        label = _linear_name(layer, name)
        return linear(x, layer.linears[name], self._codes[label], label, label)


def _program(functions: Mapping[str, Function]) -> Program:
    program = Program()
    for name, function in functions.items():
        program.add_function(name, function)
    if len(functions) > 1:
        program.default_function_name = next(iter(functions))
        program.export_as_multifunction = True
    return program


def _to_channels(hidden: Var) -> Var:
    """(1, S, H) to (1, H, 1, S)."""
    channels = mb.transpose(x=hidden, perm=[0, 2, 1], name="input_channels")
    return mb.expand_dims(x=channels, axes=[2], name="input_image")


def _layer_name(layer: Layer) -> str:
    return identifier(layer_prefix(layer.index).rstrip("."))


def _linear_name(layer: Layer, name: str) -> str:
    return identifier(layer_prefix(layer.index) + name)
