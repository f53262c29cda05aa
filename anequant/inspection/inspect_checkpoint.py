"""What a checkpoint is, and what any files of tensors hold, from config.json and headers.

Scales and codebooks of a quantized one are read too. They are vectors, and no weight is read, so this takes
seconds for a model of any size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anequant.checkpoints.header import BITS, TensorInfo
from anequant.checkpoints.layout import list_projections
from anequant.checkpoints.manifest import MANIFEST, ROTATED, read_kind, read_manifest
from anequant.checkpoints.reader import Checkpoint, read_stored
from anequant.checkpoints.stored_bits import PARTS, PARTS_OF_LINEAR, PartBits, count_part_bits
from anequant.quantization.online import Online

FLOAT, ROTATED_FLOAT, QUANTIZED = "float checkpoint", "rotated float checkpoint", "quantized checkpoint"
GRID = 2.0**-10
"""An integer grid times a scale, each entry rounded to float16, is off by less than this of its largest."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class TensorKind:
    """Tensors that differ in the numbers of their names only, which `name` has as *."""

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class TensorFiles:
    """Files of tensors; `dtypes` are bytes by dtype, `float16_bytes` what as many values take in float16."""

    tensors: int
    values: int
    kinds: tuple[TensorKind, ...]
    dtypes: Mapping[str, int]
    files: Mapping[str, int]
    float16_bytes: int


@dataclass(frozen=True)
class ScaleKind:
    """Linears whose scales are alike, as the recipe calls them, with the least and the largest magnitude."""

    kind: str
    linears: int
    input_range: tuple[float, float]
    output_range: tuple[float, float]


@dataclass(frozen=True)
class CodebookKind:
    """Codebooks of a length and kind: uniform (equal steps) or lut; the least and the largest entry."""

    kind: str
    entries: int
    count: int
    range: tuple[float, float]


@dataclass(frozen=True)
class CheckpointFacts:
    """`made_by` names what wrote it, None when the folder does not tell; `recipe` likewise."""

    kind: str
    made_by: str | None
    sizes: Mapping[str, Any]
    tensors: TensorFiles
    bits: Mapping[str, PartBits]
    scales: tuple[ScaleKind, ...]
    codebooks: tuple[CodebookKind, ...]
    online: Mapping[str, Any]
    recipe: Mapping[str, Any] | None


def inspect_checkpoint(checkpoint: Checkpoint) -> CheckpointFacts:
    """Return what a checkpoint is. Raises InputError for an anequant.json that is damaged, and what
    `read_stored` raises."""
    kind = ROTATED_FLOAT if read_kind(checkpoint.folder) == ROTATED else FLOAT
    recorded = read_manifest(checkpoint.folder) if (checkpoint.folder / MANIFEST).is_file() else {}
    spec = checkpoint.spec
    linears = [*list_projections(spec), *PARTS]
    quantized = [name for name in linears if f"{name}.output_scales" in checkpoint.tensors]
    scales, codebooks = _scales_and_codebooks(checkpoint, quantized)
    version = recorded.get("versions", {}).get("anequant")
    return CheckpointFacts(
        QUANTIZED if quantized else kind,
        f"anequant {version}" if version else None,
        {"model_type": spec.architecture.model_type, **spec.sizes, "tied": spec.tied},
        inspect_tensor_files(checkpoint.tensors),
        count_part_bits(checkpoint),
        scales,
        codebooks,
        inspect_online(checkpoint.online),
        recorded.get("recipe"),
    )


def inspect_online(online: Online) -> dict[str, Any]:
    """Return what the model does while it runs, empty where it is its weights and no more."""
    facts: dict[str, Any] = {}
    for name in ("r3", "r4"):
        rotation = getattr(online, name)
        if rotation is not None:
            facts[name] = {"size": rotation.size, "hadamard_order": rotation.order}
    if online.activations:
        formats = list(online.activations.values())
        scales = [format_.scale for format_ in formats if format_.scale is not None]
        facts["activations"] = {
            "bits": {str(bits): sum(own.bits == bits for own in formats) for bits in (4, 8)},
            "scales": "static" if scales else "dynamic",
            "scale_range": [min(scales), max(scales)] if scales else None,
            "symmetric": all(own.symmetric for own in formats),
        }
    if online.kv_bits < 16:
        facts["kv_bits"] = online.kv_bits
    if online.active and online.prefix:
        facts["float_prefix"] = online.prefix
    return facts


def _scales_and_codebooks(
    checkpoint: Checkpoint, quantized: list[str]
) -> tuple[tuple[ScaleKind, ...], tuple[CodebookKind, ...]]:
    present = [
        f"{name}.{part}"
        for name in quantized
        for part in PARTS_OF_LINEAR[1:]
        if f"{name}.{part}" in checkpoint.tensors
    ]
    vectors = dict(read_stored(checkpoint.tensors, present))
    scales: dict[str, list[tuple[Tensor, Tensor]]] = {}
    codebooks: dict[tuple[str, int], list[Tensor]] = {}
    for name in quantized:
        output = vectors[f"{name}.output_scales"]
        given = vectors.get(f"{name}.input_scales", torch.ones(1))
        scales.setdefault(classify_scales(given, output), []).append((given.abs(), output.abs()))
        if f"{name}.codebook" in vectors:
            entries = vectors[f"{name}.codebook"].float().reshape(-1)
            codebooks.setdefault((classify_codebook(entries), len(entries)), []).append(entries)
    return (
        tuple(
            ScaleKind(kind, len(pairs), _range([a for a, _ in pairs]), _range([b for _, b in pairs]))
            for kind, pairs in scales.items()
        ),
        tuple(
            CodebookKind(kind, entries, len(found), _range(found))
            for (kind, entries), found in sorted(codebooks.items())
        ),
    )


def classify_scales(input_scales: Tensor, output_scales: Tensor) -> str:
    """Return the recipe's word: group, balanced, output, tensor; or premultiplied, where all scales are 1."""
    if output_scales.ndim == 2 and output_scales.shape[1] > 1:
        return "group"
    if not bool((input_scales == input_scales.flatten()[0]).all()):
        return "balanced"
    if not bool((output_scales == output_scales.flatten()[0]).all()):
        return "output"
    return "premultiplied" if float(output_scales.flatten()[0]) == 1 else "tensor"


def classify_codebook(entries: Tensor) -> str:
    """Return uniform where the entries [n] are equally far apart, as far as float16 tells; else lut."""
    entries = entries.double().sort().values
    grid = torch.linspace(float(entries[0]), float(entries[-1]), len(entries), dtype=torch.float64)
    return "uniform" if float((entries - grid).abs().max()) <= GRID * float(entries.abs().max()) else "lut"


def _range(tensors: list[Tensor]) -> tuple[float, float]:
    return min(float(part.min()) for part in tensors), max(float(part.max()) for part in tensors)


def inspect_tensor_files(tensors: Mapping[str, TensorInfo]) -> TensorFiles:
    """Count `tensors` as `read_header` and `open_checkpoint` give them; only sizes of files are looked up."""
    found: dict[tuple[str, str, tuple[int, ...]], int] = {}
    dtypes: dict[str, int] = {}
    for name, info in tensors.items():
        key = (star_numbers(name), info.dtype, info.shape)
        found[key] = found.get(key, 0) + 1
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + stored_bytes(info)
    kinds = tuple(
        TensorKind(name, count, dtype, shape, count * math.prod(shape) * BITS[dtype] // 8)
        for (name, dtype, shape), count in found.items()
    )
    values = sum(math.prod(info.shape) for info in tensors.values())
    shards = sorted({info.shard for info in tensors.values()})
    sizes = {shard.name: shard.stat().st_size for shard in shards}
    return TensorFiles(len(tensors), values, kinds, dtypes, sizes, 2 * values)


def star_numbers(name: str) -> str:
    """Return a name with * for every part that is a number."""
    return _NUMBER.sub("*", name)


def stored_bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * BITS[info.dtype] // 8
