"""How many bits the weights of a checkpoint take, from its headers alone.

The bits of a weight are those of its code and its share of what reads the codes: a codebook and two vectors
of scales for each linear, in float16 as packages have them. Embedding and head count as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from anequant.architectures.spec import EMBEDDING, HEAD
from anequant.checkpoints.header import BITS
from anequant.checkpoints.layout import list_projections
from anequant.checkpoints.reader import Checkpoint
from anequant.quantization.codebook import count_code_bits

PROJECTIONS, WHOLE = "projections", "whole model"
PARTS = {EMBEDDING: "embedding", HEAD: "head"}
PARTS_OF_LINEAR = ("weight", "input_scales", "output_scales", "codebook")


@dataclass(frozen=True)
class PartBits:
    """Weights of a part and their width: `bits` of the codes (of the dtype where nothing is quantized), None
    where the file holds no codebook; `stored_bits` with scales and codebooks in float16, as in packages."""

    weights: int
    bits: float | None
    stored_bits: float | None


@dataclass(frozen=True)
class StoredBits:
    """Bits per weight with codebooks and scales in float16: of `whole`, that is all linears, embedding and
    head, which together take `nbytes`, and of the projections alone."""

    whole: float
    projections: float
    nbytes: int


def measure_stored_bits(checkpoint: Checkpoint) -> StoredBits | None:
    """Return the bits of a quantized checkpoint; None for a float one, and where its files hold no
    codebooks."""
    if not checkpoint.is_quantized:
        return None
    bits = count_part_bits(checkpoint)
    whole, projections = bits[WHOLE], bits[PROJECTIONS]
    if whole.stored_bits is None or projections.stored_bits is None:
        return None
    return StoredBits(
        whole.stored_bits, projections.stored_bits, math.ceil(whole.stored_bits * whole.weights / 8)
    )


def count_part_bits(checkpoint: Checkpoint) -> Mapping[str, PartBits]:
    """Return the bits of the parts that there are, by PROJECTIONS, PARTS and WHOLE, which is all of them
    without norms and biases."""
    parts: dict[str, list[tuple[int, float | None, float | None]]] = {}
    for name in (*list_projections(checkpoint.spec), *PARTS):
        if f"{name}.weight" in checkpoint.tensors:
            sizes = _linear_bits(checkpoint, name)
            for part in (PARTS.get(name, PROJECTIONS), WHOLE):
                parts.setdefault(part, []).append(sizes)
    found = {}
    for part in (PROJECTIONS, *PARTS.values(), WHOLE):
        if part in parts:
            weights, codes, stored = zip(*parts[part], strict=True)
            found[part] = PartBits(sum(weights), _share(codes, weights), _share(stored, weights))
    return found


def _linear_bits(checkpoint: Checkpoint, name: str) -> tuple[int, float | None, float | None]:
    """Return the number of weights, the bits of their codes, and those with scales and codebook."""
    shapes = {part: checkpoint.tensors.get(f"{name}.{part}") for part in PARTS_OF_LINEAR}
    counts = {part: math.prod(info.shape) for part, info in shapes.items() if info is not None}
    weights = counts["weight"]
    if "output_scales" not in counts:
        plain = float(weights * BITS[checkpoint.tensors[f"{name}.weight"].dtype])
        return weights, plain, plain
    if "codebook" not in counts:
        return weights, None, None
    codes = float(weights * max(count_code_bits(counts["codebook"]), 1))
    return weights, codes, codes + 16 * sum(counts[part] for part in counts if part != "weight")


def _share(bits: tuple[float | None, ...], weights: tuple[int, ...]) -> float | None:
    known = [count for count in bits if count is not None]
    return sum(known) / sum(weights) if len(known) == len(bits) else None
