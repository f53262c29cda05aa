"""The parts of a quantized checkpoint, read back one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from anequant.architectures.spec import EMBEDDING, HEAD, layer_prefix
from anequant.checkpoints.foreign import MOST_ENTRIES, count_stored_bits
from anequant.checkpoints.layout import list_projections
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.errors import InputError
from anequant.quantization.linear import FloatTable, QuantizedLinear


@dataclass(frozen=True)
class QuantizedLayer:
    """A decoder layer: linears and norm gains by name relative to the layer."""

    index: int
    linears: Mapping[str, QuantizedLinear]
    gains: Mapping[str, Tensor]


def open_quantized(folder: Path) -> Checkpoint:
    """`open_checkpoint`, where a tied head is one of its own in the embedding's bytes, as packages have it.

    Raises InputError too where no projection is quantized.
    """
    checkpoint = open_checkpoint(folder)
    names = list_projections(checkpoint.spec)
    if not any(f"{name}.output_scales" in checkpoint.tensors for name in names):
        raise InputError(f"'{folder}' is not quantized", remedy="run `anequant quantize` on the float model")
    return _with_head(checkpoint) if checkpoint.spec.tied else checkpoint


def _with_head(checkpoint: Checkpoint) -> Checkpoint:
    tensors = {name: info for name, info in checkpoint.tensors.items() if not name.startswith(f"{HEAD}.")}
    for name, info in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if module == EMBEDDING:
            tensors[f"{HEAD}.{part}"] = info
    return replace(checkpoint, spec=replace(checkpoint.spec, tied=False), tensors=tensors)


def load_layer(checkpoint: Checkpoint, layer: int) -> QuantizedLayer:
    """Read one layer's codes, codebooks, scales and norm gains."""
    spec, prefix = checkpoint.spec, layer_prefix(layer)
    linears = {
        linear.name: load(prefix + linear.name, checkpoint.read, checkpoint.tensors)
        for linear in spec.architecture.linears
    }
    norms = (*spec.norms, *spec.architecture.head_norms)
    return QuantizedLayer(layer, linears, {name: checkpoint.read(f"{prefix}{name}.weight") for name in norms})


def load_table(checkpoint: Checkpoint, name: str) -> QuantizedLinear | FloatTable:
    """Return the embedding or the head: quantized where it has a codebook, else float16, yet to be read."""
    if f"{name}.codebook" in checkpoint.tensors:
        return load(name, checkpoint.read, checkpoint.tensors)
    rows, columns = checkpoint.tensors[f"{name}.weight"].shape
    return FloatTable(range(rows), columns, partial(checkpoint.read, f"{name}.weight"))


def read_projection_bits(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the width of every projection by full name: from the shape of its codebook, else from its
    weight."""
    bits = {}
    for name in list_projections(checkpoint.spec):
        codebook = checkpoint.tensors.get(f"{name}.codebook")
        entries = 0 if codebook is None else math.prod(codebook.shape)
        known = 1 < entries <= MOST_ENTRIES
        bits[name] = (
            count_stored_bits(entries) if known else load(name, checkpoint.read, checkpoint.tensors).bits
        )
    return bits
