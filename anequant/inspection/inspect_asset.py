"""What an asset of Core AI is: its constants by our own reader, its functions by Apple's parser.

Where Core AI is not installed, or its parser fails, the record that anequant keeps beside an asset stands in
for the parser, and what remains unknown is told with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.checkpoints.reader import read_object
from anequant.inspection.asset_forms import Known, read_known
from anequant.targets.coreai.assemble import METADATA as ASSET_METADATA
from anequant.targets.coreai.bundle import METADATA, find_asset, read_design
from anequant.targets.coreai.design import TensorPort, list_functions
from anequant.targets.coreai.listed_weights import MULTIPLIED, Weight
from anequant.targets.coreai.listing import CONSTANT, Form, ListedFunction, Port
from anequant.targets.coreai.stored import StoredAsset

LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class AssetPort:
    """A tensor; `layout` is what a buffer has to look like in memory, "" for any."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    layout: str = ""


@dataclass(frozen=True)
class AssetFunction:
    """Operations are counted by kind, without constants; None where nobody could read them."""

    name: str
    inputs: tuple[AssetPort, ...]
    states: tuple[AssetPort, ...]
    outputs: tuple[AssetPort, ...]
    operations: Mapping[str, int] | None


@dataclass(frozen=True)
class Width:
    """Constants whose numbers are stored alike."""

    dtype: str
    count: int
    values: int
    bytes: int


@dataclass(frozen=True)
class WeightKind:
    """Weights of one name but for the number of their layer; `bits` of each value's code or number, `tables`
    of `entries` in each of them."""

    name: str
    use: str
    dtype: str
    bits: int
    tables: int
    entries: int
    count: int
    values: int


@dataclass(frozen=True)
class AssetFacts:
    """`bits` of each weight that operations multiply by, `stored_bits` with tables and scales inside; None
    where that is not known, and `missing` says why.

    metadata   of the asset; `bundle` that of the folder around it, None for an asset alone
    functions  None where neither Apple's parser nor a record tells them; so are `constants` and `weights`
    blobs      constants in the file, and `blob_bytes` of them
    """

    name: str
    metadata: Mapping[str, Any]
    bundle: Mapping[str, Any] | None
    functions: tuple[AssetFunction, ...] | None
    blobs: int
    blob_bytes: int
    constants: tuple[Width, ...] | None
    weights: tuple[WeightKind, ...] | None
    bits: float | None
    stored_bits: float | None
    files: Mapping[str, int]
    float16_bytes: int | None
    missing: Mapping[str, str]


def inspect_asset(asset: Path, bundle: Path | None = None) -> AssetFacts:
    """Return what an asset is; `bundle` is the folder that it lies in, if it is one.

    Raises InputError for a file that is damaged.
    """
    return describe_known(asset, bundle, read_known(asset, bundle))


def inspect_recorded_asset(bundle: Path) -> AssetFacts:
    """Return what the asset of a bundle is that anequant wrote, by its record: without Core AI, in no time.

    Raises InputError for a bundle without a record, or one that is damaged.
    """
    return describe_known(
        find_asset(bundle), bundle, Known(None, read_design(bundle)[0], "not read for this")
    )


def describe_known(asset: Path, bundle: Path | None, known: Known) -> AssetFacts:
    """Return what an asset is, as far as it is known."""
    stored = StoredAsset(asset)
    sizes = {name: blob.size for name, blob in stored.blobs.items()}
    forms, weights = known.forms, known.weights
    multiplied = [weight for weight in weights or () if weight.use == MULTIPLIED] or weights or []
    values = sum(weight.form.values for weight in multiplied)
    parts = sum(sizes.get(part, 0) for weight in multiplied for part in weight.parts)
    metadata = asset / ASSET_METADATA
    return AssetFacts(
        asset.name,
        read_object(metadata) if metadata.is_file() else {},
        None if bundle is None else read_object(bundle / METADATA),
        _list_functions(known),
        len(sizes),
        sum(sizes.values()),
        None if forms is None else _group_widths(forms, sizes),
        None if weights is None else _group_weights(weights),
        sum(weight.form.bits * weight.form.values for weight in multiplied) / values if values else None,
        8 * parts / values if values else None,
        {path.name: path.stat().st_size for path in sorted(asset.iterdir()) if path.is_file()},
        None if forms is None else 2 * _count_values(forms, weights or (), sizes),
        known.missing,
    )


def _list_functions(known: Known) -> tuple[AssetFunction, ...] | None:
    if known.functions is not None:
        return tuple(
            AssetFunction(
                function.name,
                _show_ports(function.inputs),
                _show_ports(function.states),
                _show_ports(function.outputs),
                count_listed(function),
            )
            for function in known.functions
            if function.public
        )
    if known.design is None:
        return None
    return tuple(
        AssetFunction(
            ports.name,
            _show_designed(ports.inputs),
            _show_designed(ports.states),
            _show_designed(ports.outputs),
            None,
        )
        for ports in list_functions(known.design)
    )


def _show_ports(ports: Sequence[Port]) -> tuple[AssetPort, ...]:
    return tuple(AssetPort(port.name, port.form.dtype, port.form.shape, port.form.layout) for port in ports)


def _show_designed(ports: Sequence[TensorPort]) -> tuple[AssetPort, ...]:
    return tuple(AssetPort(port.name, port.dtype, port.shape) for port in ports)


def count_listed(function: ListedFunction) -> dict[str, int]:
    """How often each kind of operation computes, the most frequent first."""
    counts: dict[str, int] = {}
    for operation in function.operations:
        if operation.kind not in (CONSTANT, "output"):
            counts[operation.kind] = counts.get(operation.kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _group_widths(forms: Mapping[str, Form], sizes: Mapping[str, int]) -> tuple[Width, ...]:
    found: dict[str, list[str]] = {}
    for name in sizes:
        dtype = forms[name].dtype if name in forms else "used by no function"
        found.setdefault(dtype, []).append(name)
    return tuple(
        Width(
            dtype,
            len(names),
            sum(forms[name].values for name in names if name in forms),
            sum(sizes[name] for name in names),
        )
        for dtype, names in sorted(found.items())
    )


def _group_weights(weights: Sequence[Weight]) -> tuple[WeightKind, ...]:
    groups: dict[tuple[str, str, Form, int], list[Weight]] = {}
    for weight in weights:
        shape = Form(weight.form.dtype, ())
        key = (LAYER.sub(".N.", weight.title, count=1), weight.use, shape, weight.tables)
        groups.setdefault(key, []).append(weight)
    return tuple(
        WeightKind(
            name,
            use,
            form.dtype,
            form.bits,
            tables,
            group[0].entries,
            len(group),
            sum(weight.form.values for weight in group),
        )
        for (name, use, form, tables), group in groups.items()
    )


def _count_values(forms: Mapping[str, Form], weights: Sequence[Weight], sizes: Mapping[str, int]) -> int:
    """Numbers that functions compute with: tables and scales inside weights are none."""
    inside = {part for weight in weights for part in weight.parts[1:]}
    return sum(forms[name].values for name in sizes if name in forms and name not in inside)
