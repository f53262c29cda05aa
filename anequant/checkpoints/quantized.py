"""How a QuantizedLinear lies in safetensors, and how its codes come back.

Stored beside each other (ANEMLL's per-tensor contract): `P.weight` float16, already dequantized, which
stock transformers reads as an ordinary weight; `P.input_scales` [1, in], `P.output_scales` [out, 1] (or
[out, groups], which ANEMLL does not read) and `P.codebook` [K], float32; `P.bias` [out] float16. A reader
divides the weight by both scales and snaps to the codebook: all numbers are float16 to begin with, so the
codes come back exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from anequant.checkpoints.foreign import complete_codebook, find_codebook
from anequant.errors import InputError, VerificationError
from anequant.quantization.codebook import find_nearest_codes
from anequant.quantization.codebook_kernels import look_up
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.scales import spread

ROWS = 1024
BY_ROW = {"weight", "output_scales", "bias"}


def list_quantized_tensors(
    name: str, shape: tuple[int, int], bits: int, *, bias: bool, groups: int = 1
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes that `store` yields for a QuantizedLinear called `name`."""
    rows, columns = shape
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{name}.input_scales": (torch.float32, (1, columns)),
        f"{name}.output_scales": (torch.float32, (rows, groups)),
        f"{name}.codebook": (torch.float32, (2**bits,)),
        f"{name}.weight": (torch.float16, shape),
    }
    if bias:
        entries[f"{name}.bias"] = (torch.float16, (rows,))
    return entries


def store(name: str, quantized: QuantizedLinear, *, bias: bool) -> dict[str, Tensor]:
    """Return the tensors of `list_quantized_tensors`, in the same order; checks that the codes can be
    recovered.

    Raises VerificationError naming the tensor when a reader would not get the codes back.
    """
    tensors = {
        f"{name}.input_scales": quantized.input_scale[None, :],
        f"{name}.output_scales": quantized.output_scale.reshape(len(quantized.codes), -1),
        f"{name}.codebook": quantized.codebook,
        f"{name}.weight": quantized.dequantize(torch.float16),
    }
    if bias:
        value = torch.zeros(len(quantized.codes)) if quantized.bias is None else quantized.bias
        tensors[f"{name}.bias"] = value.half()
    if not torch.equal(_recover_codes(name, tensors), quantized.codes):
        raise VerificationError(f"the codes of '{name}' cannot be recovered from its float16 weight")
    return tensors


def load(
    name: str, read: Callable[[str], Tensor], names: Mapping[str, object], rows: Tensor | None = None
) -> QuantizedLinear:
    """Read a QuantizedLinear back through `read(tensor name)`, or some `rows` of one with a codebook; `names`
    are the tensors that exist.

    A checkpoint made elsewhere may lack the codebook (it is then found in the weight), hold it in any
    order, and have negative output scales or no biases. Raises InputError naming the tensor for a missing
    part, a wrong shape or a zero scale.
    """
    require_parts(name, names)
    tensors = {
        f"{name}.{suffix}": read(f"{name}.{suffix}")
        for suffix in ("weight", "input_scales", "output_scales", "codebook", "bias")
        if f"{name}.{suffix}" in names
    }
    if rows is not None:
        for suffix in BY_ROW & {key.removeprefix(f"{name}.") for key in tensors}:
            tensors[f"{name}.{suffix}"] = tensors[f"{name}.{suffix}"][rows]
    input_scale, output_scale = check_scales(name, tensors)
    if f"{name}.codebook" in tensors:
        codebook = complete_codebook(name, tensors[f"{name}.codebook"])
    else:
        codebook = find_codebook(
            name, *(tensors[f"{name}.{suffix}"] for suffix in ("weight", "input_scales", "output_scales"))
        )
    tensors[f"{name}.codebook"] = codebook
    bias = tensors.get(f"{name}.bias")
    return QuantizedLinear(
        codes=_recover_codes(name, tensors),
        codebook=codebook,
        input_scale=input_scale,
        output_scale=output_scale,
        bias=None if bias is None or not bool(bias.any()) else bias.float(),
    )


def check_scales(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return input scales [in] and output scales [out] or [out, groups], float32, of a linear of which
    `tensors` has the weight, the scales and, if there is one, the codebook.

    Raises InputError naming the tensor for a wrong shape or a zero.
    """
    rows, columns = tensors[f"{name}.weight"].shape
    groups = _groups(tensors[f"{name}.output_scales"], columns) if f"{name}.codebook" in tensors else 1
    for suffix, shape in (("input_scales", (1, columns)), ("output_scales", (rows, groups))):
        scale = tensors[f"{name}.{suffix}"]
        if tuple(scale.shape) != shape or bool((scale == 0).any()):
            raise InputError(f"'{name}.{suffix}' must be {list(shape)} without zeros")
    outputs = tensors[f"{name}.output_scales"].float().reshape(rows, groups).squeeze(1)
    return tensors[f"{name}.input_scales"].float().reshape(-1), outputs


def require_parts(name: str, names: Mapping[str, object]) -> None:
    """Raises InputError naming what a quantized tensor lacks."""
    for suffix in ("weight", "input_scales", "output_scales"):
        if f"{name}.{suffix}" not in names:
            raise InputError(f"tensor '{name}.{suffix}' is missing", remedy="quantize the model again")


def _groups(output_scales: Tensor, columns: int) -> int:
    """Return how many groups of columns have scales of their own; one where the shape makes no sense."""
    groups = output_scales.shape[1] if output_scales.ndim == 2 else 1
    return groups if groups and columns % groups == 0 else 1


def _recover_codes(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """ANEMLL's division in float16, then the nearest codebook entry: uint8 [out, in].

    The quotient has only 65536 possible values, so the nearest entry is looked up by its bits.
    """
    weight = tensors[f"{name}.weight"].half()
    input_scales = tensors[f"{name}.input_scales"].half()
    output_scales = tensors[f"{name}.output_scales"].half()
    codebook = tensors[f"{name}.codebook"].half().float().reshape(-1)
    every_float16 = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.float16))
    code_of = find_nearest_codes(every_float16.float(), codebook)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for start in range(0, len(codes), ROWS):
        rows = slice(start, start + ROWS)
        core = weight[rows] / (input_scales * spread(output_scales[rows], weight.shape[1]))
        codes[rows] = look_up(code_of, core.view(torch.uint16))
    return codes
