"""A linear as a 1x1 convolution, with its weight in the form that its input asks for.

    input            weight                                            scales
    float16          codes into one float16 codebook                   output scale after it
    8-bit integers   codes into one int8 codebook, or int8, times a    output scale after it
                     power of two (W4A8, W8A8)
    float16          codes into a codebook, or int4 or int8, times     in the weight
                     one scale a row and group of columns

Scales of rows and columns are explicit multiplications, never folded into the weight, where they would break
the codebook up; so is a bias an addition after them, that does not eat into the convolution's accumulator.
The integers come from `quantization.codebook.round_to_integers`; their one power of two, and the scale that
`quantize` and `dequantize` have, can be left to the end of a sum of integers. Scales of groups cannot: they
are for GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anequant.architectures.spec import HEAD
from anequant.quantization.linear import FloatTable, QuantizedLinear
from anequant.targets.coreml.program.program import Var, float16_constant, identifier, share_constant
from anequant.targets.coreml.program.streaming import stream_constant
from anequant.targets.coreml.toolkit import mb, types
from anequant.targets.shared.packed_codes import Array, look_up_integers, split_codebook

CODE_DTYPES = {
    2: types.np_uint2_dtype,
    3: types.np_uint3_dtype,
    4: types.np_uint4_dtype,
    6: types.np_uint6_dtype,
    8: np.dtype(np.uint8),
}
INTEGER_DTYPES = {4: types.np_int4_dtype, 8: np.dtype(np.int8)}


@dataclass(frozen=True)
class StoredLinear:
    """A linear, its `codes` as `prepare_codes` gives them, and the names of both it and its codebook."""

    quantized: QuantizedLinear
    codes: Array
    name: str
    codebook: str


def name_weight(name: str) -> str:
    """Return the name of the value that is the weight of the linear or table `name`."""
    return f"{identifier(name)}_weight"


def name_head_part(part: int) -> str:
    """Return the name of one of the head's convolutions, counted from 1."""
    return f"{identifier(HEAD)}_{part}"


def palettize_weight(codes: Array, codebook: Tensor, name: str, shared_codebook: str, value: str = "") -> Var:
    """Emit a weight as codes (already of a CODE_DTYPES type) and one codebook, float16 or int8, for all."""
    entries = codebook.numpy() if codebook.dtype == torch.int8 else codebook.half().numpy()
    table = share_constant(entries.reshape(*(1,) * codes.ndim, -1, 1), f"{shared_codebook}_codebook")
    indices = share_constant(codes, f"{name}_codes")
    return mb.constexpr_lut_to_dense(indices=indices, lut=table, name=value or name_weight(name))


def pack_codes(quantized: QuantizedLinear) -> Array:
    """Return codes [out, in] as numpy in the sub-byte type of their width."""
    return quantized.codes.numpy().view(CODE_DTYPES[quantized.bits])


def prepare_codes(quantized: QuantizedLinear, name: str, *, rounded: bool) -> Array:
    """Return what a package holds of the codes [out, in]: the integers, or `pack_codes`.

    Raises as `split_codebook`.
    """
    integers = look_up_integers(quantized, name, rounded=rounded)
    if integers is None:
        return pack_codes(quantized)
    return integers.numpy().astype(INTEGER_DTYPES[quantized.bits])


def linear(x: Var, stored: StoredLinear, input_step: float | None = None) -> Var:
    """Emit output_scale * (codebook[codes] (input_scale * x)) + bias: (1, in, 1, S) -> (1, out, 1, S).

    With `input_step`, input_scale * x is rounded to 8-bit integers times it.
    """
    quantized, name = stored.quantized, stored.name
    rows, columns = quantized.codes.shape
    grouped = quantized.output_scale.ndim == 2
    if bool((quantized.input_scale != 1).any()):
        scale = float16_constant(quantized.input_scale, (1, columns, 1, 1), f"{name}_input_scale")
        x = mb.mul(x=x, y=scale, name=f"{name}_scaled_input")
    if input_step is not None:
        x = _round_input(x, input_step, name)
    y = mb.conv(x=x, weight=_emit_weight(stored, rounded=input_step is not None), name=f"{name}_conv")
    if not grouped:
        scale = float16_constant(quantized.output_scale, (1, rows, 1, 1), f"{name}_output_scale")
        y = mb.mul(x=y, y=scale, name=f"{name}_scaled_output")
    if quantized.bias is not None:
        bias = float16_constant(quantized.bias, (1, rows, 1, 1), f"{name}_bias")
        y = mb.add(x=y, y=bias, name=f"{name}_biased")
    return y


def float_linear(x: Var, weight: FloatTable, name: str) -> Var:
    """Emit W x on (1, in, 1, S) with a float16 weight [out, in], which is streamed."""
    rows, columns = weight.shape
    constant = stream_constant((rows, columns, 1, 1), weight.blocks, f"{name}_weight")
    return mb.conv(x=x, weight=constant, name=f"{name}_conv")


def _round_input(x: Var, step: float, name: str) -> Var:
    codes = mb.quantize(input=x, scale=np.float16(step), output_dtype="int8", name=f"{name}_input_codes")
    return mb.dequantize(input=codes, scale=np.float16(step), name=f"{name}_rounded_input")


def _emit_weight(stored: StoredLinear, *, rounded: bool) -> Var:
    """Emit the weight (out, in, 1, 1), with the scales that are inside of it."""
    name, codes = stored.name, stored.codes[:, :, None, None]
    entries, scales = stored.quantized.codebook, stored.quantized.output_scale
    if rounded:
        entries, step = split_codebook(entries, name)
        scales = torch.full((1, 1), step)
    elif scales.ndim == 1:
        return palettize_weight(codes, entries, name, stored.codebook)
    integers = codes.dtype.kind == "i"
    data = (
        share_constant(codes, f"{name}_codes")
        if integers
        else palettize_weight(codes, entries, name, stored.codebook, f"{name}_entries")
    )
    scale = float16_constant(scales, (*scales.shape, 1, 1), f"{name}_weight_scale")
    return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=name_weight(name))
