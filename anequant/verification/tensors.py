"""A written checkpoint as tensors: each is there with its dtype and shape, and its numbers are possible.

codebook        float16 numbers, ascending
input_scales    float16 numbers, positive
output_scales   float16 numbers, not zero
bias            divided by its output scale still a float16 number
weight          output_scale * codebook[codes] * input_scale, so that every code lies inside the codebook
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from anequant.architectures.spec import INPUT_SCALES
from anequant.checkpoints.layout import allow_widths, list_entries, list_widest
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.writer import DTYPE_NAMES
from anequant.errors import VerificationError, quote
from anequant.quantization.nearest import LARGEST_FLOAT16
from anequant.recipe import Recipe


def verify_layout(checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype) -> None:
    """Raise VerificationError unless the tensors are those that `recipe` writes; floats are of `dtype`."""
    bits = {name: _bits(checkpoint, name, recipe) for name in list_widest(checkpoint.spec, recipe)}
    entries = list_entries(checkpoint.spec, recipe, bits, dtype)
    for entry in entries:
        info = checkpoint.tensors.get(entry.name)
        wanted = f"{DTYPE_NAMES[entry.dtype]} {list(entry.shape)}"
        found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
        if found != wanted:
            raise VerificationError(
                f"tensor '{entry.name}' is {found}, the recipe writes {wanted}", where=str(checkpoint.folder)
            )
    for name in sorted(checkpoint.tensors.keys() - {entry.name for entry in entries}):
        raise VerificationError(
            f"tensor {quote(name)} is not one that the recipe writes", where=str(checkpoint.folder)
        )


def verify_numbers(checkpoint: Checkpoint, name: str) -> None:
    """Raise VerificationError unless the quantized linear or table `name` holds what the module says."""
    parts = {
        suffix: checkpoint.read(f"{name}.{suffix}").float()
        for suffix in ("codebook", "input_scales", "output_scales", "bias")
        if f"{name}.{suffix}" in checkpoint.tensors
    }
    for suffix, problem in _problems(parts):
        raise VerificationError(f"'{name}.{suffix}' {problem}", where=_place(checkpoint, f"{name}.{suffix}"))
    quantized = load(name, checkpoint.read, checkpoint.tensors)
    if not torch.equal(checkpoint.read(f"{name}.weight"), quantized.dequantize(torch.float16)):
        raise VerificationError(
            f"the weight of '{name}' is not what its codes say", where=_place(checkpoint, f"{name}.weight")
        )


def verify_static_scales(checkpoint: Checkpoint) -> None:
    """Raise VerificationError for a static activation scale that float16 cannot hold, or of no linear.

    That every linear with rounded inputs has one is checked when the checkpoint is opened.
    """
    activations = checkpoint.online.activations
    stated = (checkpoint.spec.config.get("quantization_config") or {}).get("static_scales", {})
    for name, scale in stated.items():
        problem = None
        if name not in activations:
            problem = "is of no linear whose input is rounded"
        elif not 0 < float(torch.tensor(scale).half()) <= LARGEST_FLOAT16:
            problem = f"is {scale:.3g}, which float16 cannot hold"
        if problem is not None:
            raise VerificationError(
                f"the static scale of {quote(name)} {problem}", where=str(checkpoint.folder / "config.json")
            )


def _bits(checkpoint: Checkpoint, name: str, recipe: Recipe) -> int:
    """Return a width that the recipe allows, by the length of the codebook."""
    widths = allow_widths(name, recipe)
    codebook = checkpoint.tensors.get(f"{name}.codebook")
    entries = 0 if codebook is None else math.prod(codebook.shape)
    return next((bits for bits in widths if 2**bits == entries), widths[0])


def _problems(parts: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    for suffix in ("codebook", INPUT_SCALES, "output_scales"):
        if not torch.equal(parts[suffix], parts[suffix].half().float()):
            yield suffix, "holds numbers that float16 cannot"
    if bool((parts["codebook"].diff() < 0).any()):
        yield "codebook", "does not ascend"
    if not bool((parts[INPUT_SCALES] > 0).all()):
        yield INPUT_SCALES, f"holds {int((parts[INPUT_SCALES] <= 0).sum())} scales that are not positive"
    if not bool((parts["output_scales"] != 0).all()):
        yield "output_scales", f"holds {int((parts['output_scales'] == 0).sum())} zeros"
    if "bias" in parts and parts["output_scales"].shape[1] == 1:
        largest = float((parts["bias"] / parts["output_scales"].reshape(-1)).abs().max())
        if not largest <= LARGEST_FLOAT16:
            yield "bias", f"is {largest:.3g} times its output scale, float16 ends at {LARGEST_FLOAT16:.5g}"


def _place(checkpoint: Checkpoint, tensor: str) -> str:
    info = checkpoint.tensors.get(tensor)
    return str(checkpoint.folder if info is None else Path(info.shard))
