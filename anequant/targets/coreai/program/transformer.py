"""The transformer's functions: decoder layers over two caches, and the head.

Attention is a pair of products a head, keys before queries (K q, with a mask [1, C, 1, q]), since the engine
fuses no heads (apple/coreai-models, skills/model-authoring/references/neural_engine_rules.md). `prompt_opt`
ends where the last layer's keys and values are known: nothing reads its hidden states.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, layer_prefix
from anequant.targets.coreai.coreai_toolkit import ops
from anequant.targets.coreai.design import (
    CACHES,
    CODES,
    COS,
    EXTEND,
    FUNCTIONAL,
    GATHERED,
    HIDDEN,
    LOGITS,
    MASK,
    NEW,
    OUTPUT_SCALE,
    PLAIN,
    POSITIONS,
    SIN,
    STEP,
    TABLE,
    TOKENS,
    name_head_part,
)
from anequant.targets.coreai.program.builder import Builder, Var
from anequant.targets.coreai.program.table_linears import emit_linear, emit_turn
from anequant.targets.shared.rotation_names import FFN, KEY, QUERY


def emit_table(builder: Builder) -> dict[str, Var]:
    """The embedding [V, 1, H], which the host keeps and gives to whoever looks tokens up."""
    if not builder.has(EMBEDDING + CODES):
        return {TABLE: builder.constant(EMBEDDING + PLAIN)}
    rows = builder.look_up(EMBEDDING)
    return {TABLE: builder.mul(rows, builder.constant(EMBEDDING + OUTPUT_SCALE))}


def emit_gather(builder: Builder, arguments: Mapping[str, Var]) -> dict[str, Var]:
    """Rows of the table [V, 1, H] for tokens [1, q]."""
    rows = ops.expand_dims(arguments[TOKENS], builder.integers([2]))
    return {GATHERED: ops.gather_nd(arguments[TABLE], rows)}


def emit_head(builder: Builder, x: Var) -> Var:
    """Logits [1, 1, S, V] of the final image [1, H, 1, S], part after part of the vocabulary."""
    parts = []
    for name in map(name_head_part, itertools.count(1)):
        if builder.has(name + CODES):
            parts.append(emit_linear(builder, x, name))
        elif builder.has(name + PLAIN):
            parts.append(builder.conv(x, builder.constant(name + PLAIN)))
        else:
            break
    return builder.transpose(builder.concat(parts, 1), 0, 2, 3, 1)


class Transformer:
    """Emits one function of the transformer; holds what its layers share."""

    def __init__(self, builder: Builder, kind: str, length: int) -> None:
        self._b, self._kind, self._length = builder, kind, length
        self._sizes = builder.design.sizes
        self._functional = builder.design.kv == FUNCTIONAL
        self._new: tuple[list[Var], list[Var]] = ([], [])

    def emit(self, arguments: Mapping[str, Var]) -> dict[str, Var]:
        """Emit it all; return what the function gives."""
        b, design = self._b, self._b.design
        self._mask, self._step = arguments[MASK], arguments.get(STEP)
        self._open_caches([arguments[name] for name in CACHES])
        self._cos, self._sin = (self._rope(arguments[POSITIONS], name) for name in (COS, SIN))
        x = b.transpose(arguments[HIDDEN], 0, 3, 2, 1)
        last = self._sizes.layers - 1
        for layer in range(self._sizes.layers):
            x = self._add_layer(x, layer, caches_only=self._kind != EXTEND and layer == last)
        if self._kind == EXTEND:
            x = b.norm(x, 1, design.eps[0], FINAL_NORM + PLAIN)
            return self._close_caches({LOGITS: emit_head(b, x)})
        return self._close_caches({} if self._functional else {LOGITS: self._first_numbers()})

    def _open_caches(self, caches: list[Var]) -> None:
        if self._functional:
            self._caches = caches
            return
        self._handles, self._caches, self._tokens = caches, [], []
        for handle in caches:
            cache, token = ops.read_handle(handle, ops.create_token())
            self._caches.append(cache)
            self._tokens.append(token)

    def _close_caches(self, outputs: dict[str, Var]) -> dict[str, Var]:
        b = self._b
        if self._functional:
            return {name: b.concat(parts, 0) for name, parts in zip(NEW, self._new, strict=True)} | outputs
        written = {
            name: ops.write_handle(handle, cache, token)
            for name, handle, cache, token in zip(
                CACHES, self._handles, self._caches, self._tokens, strict=True
            )
        }
        return written | outputs

    def _first_numbers(self) -> Var:
        """The sum of the first number of both caches: something of them, so that they are written."""
        b = self._b
        ends = [
            ops.slice_(cache, b.integers([0] * 5), b.integers([1] * 5), b.integers([1] * 5))
            for cache in self._caches
        ]
        return ops.reshape(b.add(*ends), b.integers((), np.uint32))

    def _rope(self, positions: Var, name: str) -> Var:
        """Rows of a table [C, D] at positions [1, S], as (1, 1, D, S)."""
        b = self._b
        at = ops.expand_dims(ops.cast(positions, np.int32), b.integers([2]))
        rows = ops.gather_nd(b.constant(name), at)
        return ops.expand_dims(b.transpose(rows, 0, 2, 1), b.integers([1]))

    def _add_layer(self, x: Var, layer: int, *, caches_only: bool) -> Var:
        b, eps, prefix = self._b, self._b.design.eps[0], layer_prefix(layer)
        normed = b.norm(x, 1, eps, f"{prefix}input_layernorm{PLAIN}")
        keys, values = self._store(normed, layer)
        if caches_only:
            return x
        x = b.add(x, self._attend(normed, keys, values, prefix))
        normed = b.norm(x, 1, eps, f"{prefix}post_attention_layernorm{PLAIN}")
        gate = ops.silu(emit_linear(b, normed, f"{prefix}mlp.gate_proj"))
        gated = b.mul(gate, emit_linear(b, normed, f"{prefix}mlp.up_proj"))
        return b.add(x, emit_linear(b, emit_turn(b, gated, FFN), f"{prefix}mlp.down_proj"))

    def _store(self, normed: Var, layer: int) -> tuple[Var, Var]:
        """Put this layer's keys and values into the caches; return all of them, [1, K, 1, positions]."""
        b, prefix = self._b, layer_prefix(layer)
        heads = self._sizes.key_value_heads
        key = self._project(normed, f"{prefix}self_attn.k", heads, KEY)
        value = emit_linear(b, normed, f"{prefix}self_attn.v_proj")
        return self._append(0, layer, key), self._append(1, layer, value)

    def _append(self, which: int, layer: int, new: Var) -> Var:
        b, sizes = self._b, self._sizes
        expanded = ops.expand_dims(new, b.integers([0]))
        if self._functional:
            self._new[which].append(expanded)
            return b.concat([self._row(which, layer), new], 3)
        assert self._step is not None
        end = b.add(self._step, b.integers([self._length]))
        first = b.concat([b.integers([layer, 0, 0, 0]), self._step], 0)
        last = b.concat([b.integers([layer + 1, 1, sizes.keys, 1]), end], 0)
        self._caches[which] = ops.slice_update(
            self._caches[which], first, last, b.integers([1] * 5), expanded
        )
        return self._row(which, layer)

    def _row(self, which: int, layer: int) -> Var:
        """A layer of a cache [1, K, 1, C]."""
        b = self._b
        return ops.shrink_dims(b.cut(self._caches[which], 0, layer, layer + 1), b.integers([0]))

    def _project(self, normed: Var, side: str, heads: int, turn: str) -> Var:
        """q or k [1, heads * D, 1, S]: projected, normalised where the model does, then RoPE and R3."""
        b, dim, length = self._b, self._sizes.head_dim, self._length
        x = b.reshape(emit_linear(b, normed, f"{side}_proj"), 1, heads, dim, length)
        gain = f"{side}_norm{PLAIN}"
        if b.has(gain):
            x = b.norm(x, 2, b.design.eps[1], gain)
        first, second = b.split(x, 2, 2)
        turned = b.concat([b.mul(second, b.number(-1)), first], 2)
        x = b.add(b.mul(x, self._cos), b.mul(turned, self._sin))
        return emit_turn(b, b.reshape(x, 1, heads * dim, 1, length), turn)

    def _attend(self, normed: Var, keys: Var, values: Var, prefix: str) -> Var:
        b, sizes = self._b, self._sizes
        query = self._project(normed, f"{prefix}self_attn.q", sizes.heads, QUERY)
        query = b.mul(query, b.number(sizes.head_dim**-0.5))
        queries = [b.transpose(head, 0, 2, 1, 3) for head in b.split(query, sizes.heads, 1)]
        by_position = [b.transpose(head, 0, 2, 3, 1) for head in b.split(keys, sizes.key_value_heads, 1)]
        by_channel = [b.transpose(head, 0, 2, 1, 3) for head in b.split(values, sizes.key_value_heads, 1)]
        group = sizes.heads // sizes.key_value_heads
        scores = [
            b.transpose(b.matmul(by_position[head // group], queries[head]), 0, 2, 1, 3)
            for head in range(sizes.heads)
        ]
        masked = b.add(b.concat(scores, 2), self._mask)
        weights = b.split(ops.softmax(masked, b.integers(1)), sizes.heads, 2)
        attended = [
            b.transpose(b.matmul(by_channel[head // group], b.transpose(part, 0, 2, 1, 3)), 0, 2, 1, 3)
            for head, part in enumerate(weights)
        ]
        return emit_linear(b, b.concat(attended, 1), f"{prefix}self_attn.o_proj")
