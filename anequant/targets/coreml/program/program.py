"""The pieces of a decoder layer as MIL operations, in the form the Neural Engine runs well.

Activations are float16 in (1, C, 1, S): channels on axis 1, positions last (Apple, "Deploying Transformers
on the Apple Neural Engine", 2022, principle 1). Linears, which are 1x1 convolutions, are in `linears`.

RMSNorm has no operation of its own. The mean of concat(x, -x) is zero and its variance is the mean square
of x, so layer_norm of it is RMSNorm of x and of -x; the first half is the answer. The gain costs no
operation: it is layer_norm's own.

Constants carry a `weight_id`: the functions of one package that use the same id share one copy on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anequant.targets.coreml.toolkit import Function, Program, mb

Var = Any
SMALLEST_MASK = -1e4


def identifier(name: str) -> str:
    """Return a tensor's name as a MIL identifier."""
    return name.replace(".", "_")


def float16_constant(values: Tensor, shape: tuple[int, ...], name: str) -> Var:
    return share_constant(values.half().numpy().reshape(shape), name)


def share_constant(values: np.ndarray[Any, Any], name: str) -> Var:
    constant = mb.const(val=values, name=name)
    constant.op.weight_id = name
    return constant


def rms_norm(x: Var, gain: Tensor, eps: float, axis: int, name: str) -> Var:
    """RMSNorm over `axis`; the gain is layer_norm's gamma, once for x and once for -x, unless all ones."""
    negative = mb.mul(x=x, y=np.float16(-1), name=f"{name}_negative")
    doubled = mb.concat(values=[x, negative], axis=axis, name=f"{name}_doubled")
    gamma = None
    if not bool((gain == 1).all()):
        gamma = float16_constant(torch.cat([gain, gain]), (2 * gain.numel(),), f"{name}_gain")
    normed = mb.layer_norm(
        x=doubled, axes=[axis], gamma=gamma, epsilon=np.float16(eps), name=f"{name}_normed"
    )
    y, _ = mb.split(x=normed, num_splits=2, axis=axis, name=f"{name}_half")
    return y


def rope_factors(cos: Tensor, sin: Tensor, positions: Var) -> tuple[Var, Var]:
    """Rows of the tables [context, head_dim] at `positions` [S], each as (1, 1, head_dim, S)."""
    factors = []
    for values, name in ((cos, "rope_cos"), (sin, "rope_sin")):
        table = float16_constant(values, tuple(values.shape), f"{name}_table")
        rows = mb.gather(x=table, indices=positions, axis=0, validate_indices=False, name=f"{name}_rows")
        columns = mb.transpose(x=rows, perm=[1, 0], name=f"{name}_columns")
        factors.append(mb.expand_dims(x=columns, axes=[0, 1], name=name))
    return factors[0], factors[1]


def rotate_positions(x: Var, cos: Var, sin: Var, name: str) -> Var:
    """RoPE on (1, heads, head_dim, S): x * cos + concat(-x2, x1) * sin."""
    first, second = mb.split(x=x, num_splits=2, axis=2, name=f"{name}_halves")
    negative = mb.mul(x=second, y=np.float16(-1), name=f"{name}_negative_half")
    turned = mb.concat(values=[negative, first], axis=2, name=f"{name}_turned")
    kept = mb.mul(x=x, y=cos, name=f"{name}_kept")
    moved = mb.mul(x=turned, y=sin, name=f"{name}_moved")
    return mb.add(x=kept, y=moved, name=f"{name}_rotated")


def attention(query: Var, keys: Var, values: Var, mask: Var, name: str) -> Var:
    """softmax(q k^T + mask) v: query (1, kv, group * S, D), keys and values (1, kv, context, D)."""
    scores = mb.matmul(x=query, y=keys, transpose_y=True, name=f"{name}_scores")
    masked = mb.add(x=scores, y=mask, name=f"{name}_masked")
    weights = mb.softmax(x=masked, axis=-1, name=f"{name}_weights")
    return mb.matmul(x=weights, y=values, name=f"{name}_attended")


def finite_mask(mask: Var, repeats: int) -> Var:
    """The causal mask (1, 1, S, context), -inf replaced by a finite value, once per query head of a group."""
    finite = mb.maximum(x=mask, y=np.float16(SMALLEST_MASK), name="finite_mask")
    if repeats == 1:
        return finite
    return mb.concat(values=[finite] * repeats, axis=2, name="group_mask")


def write_state(state: Var, current: Var, row: int, new: Var, positions: tuple[Var, Var], name: str) -> Var:
    """Put new (1, kv, S, D) into row [row] of the cache, from one position up to another; the cache then."""
    shape, (start, end) = new.shape, positions
    begin = mb.concat(
        values=[np.array([row, 0], np.int32), start, np.array([0], np.int32)], axis=0, name=f"{name}_begin"
    )
    stop = mb.concat(
        values=[np.array([row + 1, shape[1]], np.int32), end, np.array([shape[3]], np.int32)],
        axis=0,
        name=f"{name}_end",
    )
    updated = mb.slice_update(x=current, update=new, begin=begin, end=stop, name=f"{name}_updated")
    return mb.coreml_update_state(state=state, value=updated, name=f"{name}_stored")


def state_row(cache: Var, row: int, name: str) -> Var:
    """Row [row] of the cache (2 * layers, kv, context, D), kept at rank 4."""
    _, heads, context, head_dim = cache.shape
    return mb.slice_by_index(
        x=cache, begin=[row, 0, 0, 0], end=[row + 1, heads, context, head_dim], name=name
    )


def forget_names() -> None:
    """Let names be numbered from the start, also after a program that was built and never saved."""
    mb.name_count.clear()


def build_program(functions: Mapping[str, Function]) -> Program:
    """Build a program of these functions; the first is the default one."""
    program = Program()
    for name, function in functions.items():
        program.add_function(name, function)
    if len(functions) > 1:
        program.default_function_name = next(iter(functions))
        program.export_as_multifunction = True
    return program


def to_channels(hidden: Var) -> Var:
    """(1, S, H) to (1, H, 1, S)."""
    channels = mb.transpose(x=hidden, perm=[0, 2, 1], name="input_channels")
    return mb.expand_dims(x=channels, axes=[2], name="input_image")
