"""An asset's constants, read from its file without Apple's runtime, against the checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, HEAD, layer_prefix
from anequant.checkpoints.layers import load_layer, load_table
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import VerificationError
from anequant.jobs.control import Progress
from anequant.quantization.linear import FloatTable, QuantizedLinear
from anequant.targets.coreai.constant_file import split_rows
from anequant.targets.coreai.design import Design
from anequant.targets.coreai.stored import StoredAsset
from anequant.targets.shared.headroom import Headroom, fit_layer, fit_table
from anequant.targets.shared.packed_codes import take_rows


def verify_asset_constants(
    asset: Path, design: Design, checkpoint: Checkpoint, headroom: Headroom, progress: Progress
) -> int:
    """Return how many constants are the checkpoint's, bit for bit, as they lie in the asset's file.

    Codes and tables of every quantized tensor, its scales and its bias; read without Apple's runtime. Raises
    VerificationError for one that is not, or is missing or unknown.
    """
    stored, spec = StoredAsset(asset), checkpoint.spec
    unknown = stored.blobs.keys() ^ design.constants.keys()
    if unknown:
        name = min(unknown)
        what = "is none of the design's" if name in stored.blobs else "is missing"
        raise VerificationError(f"constant '{name}' {what}", where=str(asset))
    count = 0
    for index in range(spec.num_layers):
        progress(f"layer {index}", index / spec.num_layers)
        layer = fit_layer(spec, load_layer(checkpoint, index), headroom)
        for name, linear in layer.linears.items():
            count += _check_linear(stored, design, layer_prefix(index) + name, linear)
    for name in (EMBEDDING, HEAD):
        table = load_table(checkpoint, name)
        if name == EMBEDDING:
            table = fit_table(table, headroom)
        rows = list(table.rows) if isinstance(table, FloatTable) else table.codes
        parts = (
            {name: slice(None)}
            if name == EMBEDDING
            else {f"{HEAD}.{number}": part for number, part in enumerate(split_rows(len(rows)), 1)}
        )
        for part_name, part in parts.items():
            if isinstance(table, FloatTable):
                count += _check_float(stored, design, f"{part_name}.weight", table.part(part))
            else:
                count += _check_linear(stored, design, part_name, take_rows(table, part))
    return count


def _check_linear(stored: StoredAsset, design: Design, name: str, linear: QuantizedLinear) -> int:
    """Compare codes, table, scales and bias; return how many there are."""
    parts: dict[str, Tensor | None] = {
        "codes": linear.codes,
        "codebook": linear.codebook,
        "output_scale": linear.output_scale,
        "input_scale": linear.input_scale if bool((linear.input_scale != 1).any()) else None,
        "bias": linear.bias,
    }
    for part, expected in parts.items():
        full = f"{name}.{part}"
        if (full in design.constants) != (expected is not None) and part != "input_scale":
            raise VerificationError(f"constant '{full}' is missing or too many", where=str(stored.path))
        if expected is not None:
            _require_equal(stored, design, full, expected)
    return sum(expected is not None for expected in parts.values())


def _check_float(stored: StoredAsset, design: Design, name: str, table: FloatTable) -> int:
    """Compare a table in float16, some rows after the other."""
    pieces = (piece for piece in stored.read(name))
    held = b""
    for block in table.blocks():
        wanted = block.to(getattr(torch, design.sizes.dtype)).contiguous().numpy().tobytes()
        while len(held) < len(wanted) and (piece := next(pieces, b"")):
            held += piece
        if held[: len(wanted)] != wanted:
            raise VerificationError(f"'{name}' is not the checkpoint's", where=str(stored.path))
        held = held[len(wanted) :]
    if held or next(pieces, b""):
        raise VerificationError(f"'{name}' is longer than the checkpoint's", where=str(stored.path))
    return 1


def _require_equal(stored: StoredAsset, design: Design, name: str, expected: Tensor) -> None:
    found = stored.load(name, design.constants[name])
    wanted = expected.to(found.dtype).reshape(found.shape)
    if not torch.equal(found, wanted):
        raise VerificationError(f"'{name}' is not the checkpoint's", where=str(stored.path))
