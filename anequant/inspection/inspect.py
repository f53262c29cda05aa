"""What a path holds: a checkpoint, packages, an asset of Core AI, an output of convert, or tensors.

Only headers and programs are read, and of a quantized checkpoint its scales and codebooks; weights are read
for a single tensor, when it is asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anequant.checkpoints.header import LONGEST_NAME, TensorInfo, read_header
from anequant.checkpoints.places import CHECKPOINT_FOLDER, PACKAGES_FOLDER, find_bundle
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint, open_checkpoint, read_stored
from anequant.errors import InputError, UnsupportedError, UsageError, quote
from anequant.evaluation.distribution import Distribution, measure_distribution
from anequant.inspection.asset_tensors import AssetTensor, list_asset_tensors, load_asset_tensor
from anequant.inspection.inspect_asset import AssetFacts, inspect_asset
from anequant.inspection.inspect_checkpoint import (
    CheckpointFacts,
    TensorFiles,
    inspect_checkpoint,
    inspect_tensor_files,
)
from anequant.inspection.inspect_package import PackageFacts, inspect_package
from anequant.targets.coreai.assemble import PROGRAM
from anequant.targets.coreai.bundle import find_asset
from anequant.targets.coreml.census import find_constant, load_constant
from anequant.targets.coreml.graph import read_graphs
from anequant.targets.coreml.meta import META, read_meta
from anequant.targets.coreml.storage import Palettized, damage

CONVERSION, PACKAGES, PACKAGE, FILE = "output of convert", "folder of packages", "package", "safetensors file"
ASSET, BUNDLE = "asset of Core AI", "bundle of Core AI"


@dataclass(frozen=True)
class Parts:
    """What a path is made of: a checkpoint's folder, packages, an asset and the bundle around it, or one file
    of tensors."""

    kind: str
    checkpoint: Path | None = None
    packages: tuple[Path, ...] = ()
    file: Path | None = None
    asset: Path | None = None
    bundle: Path | None = None


@dataclass(frozen=True)
class Inspection:
    """`kind` says what the path is; `set` is what meta.yaml says of the packages, None without one."""

    kind: str
    checkpoint: CheckpointFacts | None
    packages: tuple[PackageFacts, ...]
    set: dict[str, Any] | None
    file: TensorFiles | None
    asset: AssetFacts | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CodeUse:
    """A codebook entry and how many codes name it."""

    entry: float
    count: int


@dataclass(frozen=True)
class TensorFacts:
    """One tensor; `codes` only where it is palettized with one table, `tables` counts those of a package."""

    name: str
    place: str
    dtype: str
    shape: tuple[int, ...]
    distribution: Distribution
    codes: tuple[CodeUse, ...] | None
    tables: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_parts(path: Path) -> Parts:
    """Find out what a path is made of. Raises InputError for one that does not exist or holds none of it."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(
                f"'{path.name}' is no safetensors file", remedy="name one, a model folder or an .mlpackage"
            )
        return Parts(FILE, file=path)
    if not path.is_dir():
        raise InputError(f"'{path}' does not exist")
    if (path / "Manifest.json").is_file():
        return Parts(PACKAGE, packages=(path,))
    if (path / PROGRAM).is_file():
        return Parts(ASSET, asset=path)
    checkpoint, packages = path / CHECKPOINT_FOLDER, path / PACKAGES_FOLDER
    bundle = find_bundle(path)
    asset = None if bundle is None else find_asset(bundle)
    if checkpoint.is_dir() and (packages.is_dir() or bundle is not None):
        found = tuple(sorted(packages.glob("*.mlpackage")))
        return Parts(CONVERSION, checkpoint, found, asset=asset, bundle=bundle)
    if bundle is not None:
        return Parts(BUNDLE, asset=asset, bundle=bundle)
    found = tuple(sorted(path.glob("*.mlpackage")))
    if found:
        return Parts(PACKAGES, packages=found)
    if (path / "config.json").is_file():
        return Parts("checkpoint", path)
    raise InputError(
        f"'{path}' holds neither a checkpoint nor packages",
        remedy="name a folder with config.json and safetensors, an .mlpackage, a folder of them, or a bundle",
    )


def inspect(path: Path) -> Inspection:
    """Return what a path holds, and in what form.

    Raises InputError for a path that holds nothing of the kind or is damaged, UnsupportedError for an
    architecture or a kind of Core ML model that is not known.
    """
    parts = find_parts(path)
    checkpoint = None if parts.checkpoint is None else inspect_checkpoint(open_checkpoint(parts.checkpoint))
    meta = parts.packages[0].parent if parts.packages and parts.kind != PACKAGE else None
    return Inspection(
        checkpoint.kind if parts.kind == "checkpoint" and checkpoint is not None else parts.kind,
        checkpoint,
        tuple(inspect_package(package) for package in parts.packages),
        asdict(read_meta(meta)) if meta is not None and (meta / META).is_file() else None,
        None if parts.file is None else inspect_tensor_files(read_header(parts.file)),
        None if parts.asset is None else inspect_asset(parts.asset, parts.bundle),
    )


def inspect_tensor(path: Path, name: str) -> TensorFacts:
    """Return the statistics of one tensor: `name` is as in the file, or a linear's, for its weight; in a
    package or an asset a constant's.

    Raises UsageError with a suggestion for a name that is not there, and what `inspect` raises.
    """
    parts, known = find_parts(path), []
    if parts.file is not None:
        tensors = read_header(parts.file)
        if name in tensors:
            return _stored(tensors, name, parts.file.name)
        known += list(tensors)
    if parts.checkpoint is not None:
        checkpoint = open_checkpoint(parts.checkpoint)
        for full in (name, f"{name}.weight"):
            if full in checkpoint.tensors:
                return _of_checkpoint(checkpoint, full)
        known += list(checkpoint.tensors)
    for package in parts.packages:
        graphs = read_graphs(package)
        found = find_constant(graphs, name)
        if found is not None:
            with damage(str(package)):
                return _of_package(name, package.name, load_constant(*found))
        known += [node.name for graph in graphs for node in graph.nodes if node.constant]
    if parts.asset is not None:
        loaded = load_asset_tensor(parts.asset, parts.bundle, name)
        if loaded is not None:
            return _of_asset(name, parts.asset.name, loaded)
        known += list_asset_tensors(parts.asset)
    raise UsageError(f"no tensor {quote(name)} in '{path}'", remedy=_suggestion(name, known))


def _suggestion(name: str, known: list[str]) -> str:
    """Return names that are close, else some that there are."""
    close = difflib.get_close_matches(name[:LONGEST_NAME], known, n=3)
    listed = " or ".join(quote(word) for word in close or known[:3])
    return f"did you mean {listed}?" if close else f"there are {len(known)}, for example {listed}"


def _stored(tensors: dict[str, TensorInfo], name: str, place: str) -> TensorFacts:
    ((_, tensor),) = read_stored(tensors, [name])
    return _facts(name, place, tensors[name].dtype, tensor, None, None)


def _of_checkpoint(checkpoint: Checkpoint, name: str) -> TensorFacts:
    stored = _stored(checkpoint.tensors, name, checkpoint.tensors[name].shard.name)
    linear = name.removesuffix(".weight")
    if name == linear or f"{linear}.output_scales" not in checkpoint.tensors:
        return stored
    quantized = load(linear, checkpoint.read, checkpoint.tensors)
    codes = tuple(_uses(quantized.codes, quantized.codebook))
    return TensorFacts(name, stored.place, stored.dtype, stored.shape, stored.distribution, codes, 1)


def _of_package(name: str, place: str, value: Any) -> TensorFacts:
    if isinstance(value, str):
        raise UnsupportedError(f"constant {quote(name)} is the text {quote(value)}, not a tensor")
    if not isinstance(value, Palettized):
        return _facts(name, place, _dtype(value), value, None, None)
    *_, entries, width = value.codebook.shape
    tables = value.codebook.numel() // (entries * width)
    single = tables == 1 and width == 1
    codes = tuple(_uses(value.codes, value.codebook.reshape(-1))) if single else None
    return _facts(name, place, _dtype(value.codebook), value.dense(), codes, tables)


def _of_asset(name: str, place: str, tensor: AssetTensor) -> TensorFacts:
    codes = None
    if tensor.codes is not None and tensor.codebook is not None:
        codes = tuple(_uses(tensor.codes, tensor.codebook))
    return _facts(name, place, tensor.dtype, tensor.dense, codes, tensor.tables)


def _facts(
    name: str, place: str, dtype: str, tensor: Tensor, codes: tuple[CodeUse, ...] | None, tables: int | None
) -> TensorFacts:
    if tensor.is_complex():
        raise UnsupportedError(f"tensor {quote(name)} is complex")
    return TensorFacts(name, place, dtype, tuple(tensor.shape), measure_distribution(tensor), codes, tables)


def _uses(codes: Tensor, codebook: Tensor) -> Iterator[CodeUse]:
    counts = codes.reshape(-1).int().bincount(minlength=len(codebook)).tolist()
    return (CodeUse(float(entry), count) for entry, count in zip(codebook, counts, strict=True))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
