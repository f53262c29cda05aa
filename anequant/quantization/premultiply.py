"""Unit scales: the one scale of a tensor moves into its codebook.

    s * codebook[codes] = (s codebook)[codes],

so the weight stays what it is in float16, and a reader that divides by scales of one finds it in the
codebook. Only one scale for the whole tensor can move: a codebook holds no row and no column.
"""

from __future__ import annotations

import torch

from anequant.errors import UnsupportedError
from anequant.quantization.linear import QuantizedLinear


def premultiply_scales(quantized: QuantizedLinear, name: str) -> QuantizedLinear:
    """The same weight with scales of one and the scaled codebook, rounded to float16 as the weight is.

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
