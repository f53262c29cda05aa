"""Scales that cost nothing at run time: folded into what comes before, or into the codebook.

A balanced input scale d multiplies a linear's input at run time. Where several linears read the same input
and share one d, the multiplication commutes with what made that input:

    q, k, v and gate, up   read a norm whose gain is free since folding: the gain becomes d;
    down                   reads silu(gate) * up, so up's rows (and bias) become d up;
    o                      reads mixtures of v over positions, so v's rows (and bias) become d v, where d
                           must be the same for all query heads that share a value head.

Either way the linear's own columns are divided by d. The layer computes what it did, and its weights have
columns of equal size, so that scales on rows alone then balance them.

The one scale of a tensor moves into its codebook,

    s * codebook[codes] = (s codebook)[codes],

so the weight stays what it is in float16, and a reader that divides by scales of one finds it in the
codebook. Only one scale for the whole tensor can move: a codebook holds no row and no column.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anequant.architectures.spec import ATTENDED, Linear, ModelSpec
from anequant.errors import UnsupportedError
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.scales import balance_scales


def fold_input_scales(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the layer (tensors by name relative to it) with balanced columns and the same output.

    Only input scales that float16 holds are used, so that a gain of ones becomes one that can be stored.
    """
    result = dict(tensors)
    for group in spec.input_groups:
        heads = _readers(spec, group[0])
        stacked = torch.cat([result[f"{linear.name}.weight"].float() for linear in group])
        by_head = stacked.view(len(stacked), *heads).transpose(1, 2).reshape(-1, heads[0] * heads[2])
        scale = balance_scales(by_head)[1].half().float()
        repeated = scale.view(heads[0], 1, heads[2]).expand(heads).reshape(-1)
        for linear in group:
            result[f"{linear.name}.weight"] = result[f"{linear.name}.weight"] / repeated
        before = group[0].norm or group[0].source
        for name, shape in ((f"{before}.weight", (len(scale), -1)), (f"{before}.bias", (len(scale), 1))):
            if name in result:
                result[name] = (result[name].view(shape) * scale[:, None]).view_as(result[name])
    return result


def _readers(spec: ModelSpec, linear: Linear) -> tuple[int, int, int]:
    """(heads, readers, size): `readers` inputs of the linear show one output coordinate of its source, in
    blocks of `size` for each of `heads`."""
    if linear.input == ATTENDED:
        return spec.num_key_value_heads, spec.num_heads // spec.num_key_value_heads, spec.head_dim
    return 1, 1, spec.width(linear.input)


def premultiply_scales(quantized: QuantizedLinear, name: str) -> QuantizedLinear:
    """Return the same weight with scales of one and the scaled codebook, rounded to float16 as the weight is.

    Raises UnsupportedError, naming the tensor, when the scales are not one number or float16 cannot tell
    the scaled entries apart.
    """
    rows, columns = quantized.output_scale, quantized.input_scale
    if not (bool((rows == rows[0]).all()) and bool((columns == columns[0]).all())):
        raise UnsupportedError(
            f"'{name}' has more than one scale, its codebook cannot hold them",
            remedy="premultiply scales only with scales = 'tensor'",
        )
    codebook = (quantized.codebook * rows[0] * columns[0]).half().float()
    if bool((codebook.diff() <= 0).any()):
        raise UnsupportedError(
            f"the scaled codebook of '{name}' has entries that float16 cannot tell apart",
            remedy="keep the scales beside the weight",
        )
    return QuantizedLinear(
        quantized.codes, codebook, torch.ones_like(columns), torch.ones_like(rows), quantized.bias
    )
