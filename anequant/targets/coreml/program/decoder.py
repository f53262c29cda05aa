"""Decoder layers as a Core ML program with two functions, `infer` and `prefill`, over one state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from anequant.architectures.spec import Space, layer_prefix
from anequant.checkpoints.layers import QuantizedLayer
from anequant.targets.coreml.meta import INFER, PREFILL
from anequant.targets.coreml.program.linears import StoredLinear, linear, prepare_codes
from anequant.targets.coreml.program.online_rotations import emit_weights, rotate_channels
from anequant.targets.coreml.program.program import (
    Var,
    attention,
    build_program,
    finite_mask,
    identifier,
    rms_norm,
    rope_factors,
    rotate_positions,
    state_row,
    to_channels,
    write_state,
)
from anequant.targets.coreml.toolkit import TARGET, Function, Program, mb, types
from anequant.targets.shared.geometry import Geometry
from anequant.targets.shared.package_task import Chunk
from anequant.targets.shared.packed_codes import Array
from anequant.targets.shared.rotation_names import FFN, KEY, QUERY
from anequant.targets.shared.rotation_weights import make_online_weights

STATE = "model_model_kv_cache_0"


def chunk_program(chunk: Chunk) -> Program:
    """The layers of a chunk with `infer`, which ends in the final norm of the last chunk, and `prefill`."""
    activations = chunk.geometry.online.activations
    codes = {
        _linear_name(layer, name): prepare_codes(
            quantized, _full_name(layer, name), rounded=_full_name(layer, name) in activations
        )
        for layer in chunk.layers
        for name, quantized in layer.linears.items()
    }
    return build_program({name: _chunk_function(chunk, codes, name) for name in (INFER, PREFILL)})


def _chunk_function(chunk: Chunk, codes: Mapping[str, Array], name: str) -> Function:
    geometry, spec = chunk.geometry, chunk.geometry.spec
    length = 1 if name == INFER else geometry.batch
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
        x = to_channels(function.inputs["hidden_states"])
        for layer in chunk.layers:
            x = builder.add_layer(x, layer)
        if chunk.final_gain is not None and name == INFER:
            x = rms_norm(x, chunk.final_gain, geometry.residual_eps, 1, "final_norm")
        if chunk.final_gain is not None and name == PREFILL:
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
        codes: Mapping[str, Array],
        length: int,
    ) -> None:
        spec = geometry.spec
        self._spec = spec
        self._online = geometry.online
        self._residual_eps = geometry.residual_eps
        self._codes = codes
        self._length = length
        self._group = spec.num_heads // spec.num_key_value_heads
        self._mask = finite_mask(inputs["causal_mask"], self._group)
        self._turns = {
            name: emit_weights(weights, name)
            for name, weights in make_online_weights(spec, geometry.online).items()
        }
        self._into_ffn = {
            linear.name for linear in spec.architecture.linears if linear.input.space is Space.FFN
        }
        self._cos, self._sin = rope_factors(geometry.cos, geometry.sin, inputs["position_ids"])
        start = inputs["current_pos"]
        self._positions = (start, mb.add(x=start, y=np.array([length], np.int32), name="end_pos"))
        self._state = inputs[STATE]
        self._cache = mb.read_state(input=self._state, name="cache")

    def add_layer(self, x: Var, layer: QuantizedLayer) -> Var:
        """(1, hidden, 1, S) after one pre-norm decoder layer."""
        prefix = _layer_name(layer)
        attention_norm, mlp_norm = self._spec.norms
        normed = self._norm(x, layer, attention_norm)
        x = mb.add(x=x, y=self._attend(normed, layer), name=f"{prefix}_after_attention")
        normed = self._norm(x, layer, mlp_norm)
        gate = mb.silu(x=self._linear(normed, layer, "mlp.gate_proj"), name=f"{prefix}_gate")
        gated = mb.mul(x=gate, y=self._linear(normed, layer, "mlp.up_proj"), name=f"{prefix}_gated")
        return mb.add(x=x, y=self._linear(gated, layer, "mlp.down_proj"), name=f"{prefix}_output")

    def _attend(self, normed: Var, layer: QuantizedLayer) -> Var:
        spec, prefix, length = self._spec, _layer_name(layer), self._length
        heads, kv_heads, head_dim = spec.num_heads, spec.num_key_value_heads, spec.head_dim
        query = self._project_rotated(normed, layer, "self_attn.q", heads, QUERY)
        query = mb.mul(x=query, y=np.float16(head_dim**-0.5), name=f"{prefix}_query_scaled")
        key = self._project_rotated(normed, layer, "self_attn.k", kv_heads, KEY)
        value = self._heads(self._linear(normed, layer, "self_attn.v_proj"), kv_heads, f"{prefix}_value")

        value_row = spec.num_layers + layer.index
        for row, new, name in ((layer.index, key, f"{prefix}_key"), (value_row, value, f"{prefix}_value")):
            by_position = mb.transpose(x=new, perm=[0, 1, 3, 2], name=f"{name}_by_position")
            self._cache = write_state(self._state, self._cache, row, by_position, self._positions, name)
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

    def _project_rotated(self, normed: Var, layer: QuantizedLayer, side: str, heads: int, turn: str) -> Var:
        """Emit q or k (1, heads, head_dim, S): projected, normalised if the model does, then RoPE, R3."""
        name = f"{_layer_name(layer)}_{identifier(side)}"
        x = self._heads(self._linear(normed, layer, f"{side}_proj"), heads, name)
        gain = layer.gains.get(f"{side}_norm")
        if gain is not None:
            x = rms_norm(x, gain, self._spec.rms_norm_eps, 2, f"{name}_norm")
        x = rotate_positions(x, self._cos, self._sin, name)
        if turn not in self._turns:
            return x
        flat = [1, heads * self._spec.head_dim, 1, self._length]
        x = rotate_channels(
            mb.reshape(x=x, shape=flat, name=f"{name}_flat"), self._turns[turn], f"{name}_{turn}"
        )
        return self._heads(x, heads, f"{name}_turned")

    def _heads(self, x: Var, heads: int, name: str) -> Var:
        return mb.reshape(x=x, shape=[1, heads, self._spec.head_dim, self._length], name=f"{name}_heads")

    def _norm(self, x: Var, layer: QuantizedLayer, norm: str) -> Var:
        name = f"{_layer_name(layer)}_{norm}"
        return rms_norm(x, layer.gains[norm], self._residual_eps, 1, name)

    def _linear(self, x: Var, layer: QuantizedLayer, name: str) -> Var:
        label = _linear_name(layer, name)
        if name in self._into_ffn and FFN in self._turns:
            x = rotate_channels(x, self._turns[FFN], f"{label}_{FFN}")
        format_ = self._online.activations.get(_full_name(layer, name))
        step = None if format_ is None else format_.scale
        return linear(x, StoredLinear(layer.linears[name], self._codes[label], label, label), step)


def _layer_name(layer: QuantizedLayer) -> str:
    return identifier(layer_prefix(layer.index).rstrip("."))


def _full_name(layer: QuantizedLayer, name: str) -> str:
    return layer_prefix(layer.index) + name


def _linear_name(layer: QuantizedLayer, name: str) -> str:
    return identifier(_full_name(layer, name))
