"""The pieces of a decoder layer as MIL operations, in the form the Neural Engine runs well.

Activations are float16 in (1, C, 1, S): channels on axis 1, positions last (Apple, "Deploying Transformers
on the Apple Neural Engine", 2022, principle 1). A linear is a 1x1 convolution whose weight is a palettized
constant with one codebook for the tensor; its two scales are explicit multiplications around it, never
folded into the weight, where they would break the codebook up. Its bias is an addition after them, so
that it does not eat into the convolution's accumulator.

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

from anequant.architectures.spec import HEAD
from anequant.coreml.toolkit import Function, Program, mb, types
from anequant.quantization.linear import QuantizedLinear

Var = Any
CODE_DTYPES = {
    2: types.np_uint2_dtype,
    3: types.np_uint3_dtype,
    4: types.np_uint4_dtype,
    6: types.np_uint6_dtype,
    8: np.dtype(np.uint8),
}
SMALLEST_MASK = -1e4


def identifier(name: str) -> str:
    """A tensor's name as a MIL identifier."""
    return name.replace(".", "_")


def weight_value(name: str) -> str:
    """The name under which `palettized` emits the weight of the linear or table `name`."""
    return f"{identifier(name)}_weight"


def head_part(part: int) -> str:
    """The name of one of the head's convolutions, counted from 1."""
    return f"{identifier(HEAD)}_{part}"


def float16_constant(values: Tensor, shape: tuple[int, ...], name: str) -> Var:
    return _shared(values.half().numpy().reshape(shape), name)


def palettized(codes: np.ndarray[Any, Any], codebook: Tensor, name: str, shared_codebook: str) -> Var:
    """A weight as codes (already of a CODE_DTYPES type) and one codebook for all of them."""
    ones = (1,) * codes.ndim
    entries = _shared(codebook.half().numpy().reshape(*ones, -1, 1), f"{shared_codebook}_codebook")
    indices = _shared(codes, f"{name}_codes")
    return mb.constexpr_lut_to_dense(indices=indices, lut=entries, name=weight_value(name))


def packed_codes(quantized: QuantizedLinear) -> np.ndarray[Any, Any]:
    """Codes [out, in] as numpy in the sub-byte type of their width."""
    return quantized.codes.numpy().view(CODE_DTYPES[quantized.bits])


def linear(x: Var, quantized: QuantizedLinear, codes: np.ndarray[Any, Any], name: str, codebook: str) -> Var:
    """y = output_scale * (codebook[codes] (input_scale * x)) + bias on (1, in, 1, S) -> (1, out, 1, S)."""
    rows, columns = quantized.codes.shape
    if bool((quantized.input_scale != 1).any()):
        scale = float16_constant(quantized.input_scale, (1, columns, 1, 1), f"{name}_input_scale")
        x = mb.mul(x=x, y=scale, name=f"{name}_scaled_input")
    weight = palettized(codes.reshape(rows, columns, 1, 1), quantized.codebook, name, codebook)
    y = mb.conv(x=x, weight=weight, name=f"{name}_conv")
    scale = float16_constant(quantized.output_scale, (1, rows, 1, 1), f"{name}_output_scale")
    y = mb.mul(x=y, y=scale, name=f"{name}_scaled_output")
    if quantized.bias is not None:
        bias = float16_constant(quantized.bias, (1, rows, 1, 1), f"{name}_bias")
        y = mb.add(x=y, y=bias, name=f"{name}_biased")
    return y


def float_linear(x: Var, weight: Tensor, name: str) -> Var:
    """y = W x on (1, in, 1, S) with a float16 weight [out, in]."""
    rows, columns = weight.shape
    return mb.conv(
        x=x, weight=float16_constant(weight, (rows, columns, 1, 1), f"{name}_weight"), name=f"{name}_conv"
    )


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


def write_state(state: Var, current: Var, row: int, new: Var, start: Var, end: Var, name: str) -> Var:
    """Put new (1, kv, S, D) into rows [row] and positions [start, end) of the cache; the cache after it."""
    shape = new.shape
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


def build_program(functions: Mapping[str, Function]) -> Program:
    """A program of these functions; the first is the default one."""
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


def _shared(values: np.ndarray[Any, Any], name: str) -> Var:
    constant = mb.const(val=values, name=name)
    constant.op.weight_id = name
    return constant
