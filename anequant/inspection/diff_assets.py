"""What differs between two assets of Core AI: functions, constants, and what their bundles say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anequant.checkpoints.reader import read_object
from anequant.inspection.asset_forms import Known
from anequant.inspection.asset_tensors import load_known_tensor
from anequant.inspection.diff_checkpoints import (
    Form,
    Pair,
    ValueDifference,
    diff_keys,
    diff_named,
    diff_values,
)
from anequant.inspection.diff_packages import FunctionDifferences, PackageDifferences, diff_counts
from anequant.inspection.inspect_asset import count_listed
from anequant.targets.coreai.bundle import METADATA
from anequant.targets.coreai.listing import ListedFunction, Operation, read_listing
from anequant.targets.coreai.stored import StoredAsset

NAMES = {"name", "assets", "compilation"}
"""What bundles say of themselves that depends on where and when they were written."""


@dataclass(frozen=True)
class OpenAsset:
    """An asset to compare: its constants and functions, and what its bundle says."""

    name: str
    stored: StoredAsset
    known: Known
    metadata: dict[str, Any]

    @property
    def functions(self) -> dict[str, ListedFunction]:
        return {function.name: function for function in self.known.functions or ()}

    @property
    def constants(self) -> list[str]:
        """Names of the constants, tables and scales inside weights left out."""
        inside = {part for weight in self.known.weights or () for part in weight.parts[1:]}
        forms = self.known.forms or {}
        return [name for name in self.stored.blobs if name in forms and name not in inside]


def open_asset(asset: Path, bundle: Path | None) -> OpenAsset:
    """Open an asset. Raises as `read_listing` and StoredAsset."""
    said = {} if bundle is None else read_object(bundle / METADATA)
    metadata = {key: value for key, value in said.items() if key not in NAMES}
    return OpenAsset(asset.name, StoredAsset(asset), Known(read_listing(asset), None, ""), metadata)


def diff_assets(a: OpenAsset, b: OpenAsset) -> PackageDifferences:
    """Compare two assets, one constant of each at a time.

    Raises UnsupportedError where Core AI is not installed, or for a constant of a type that is not read.
    """
    ours, theirs = a.functions, b.functions
    found = [_diff_functions(function, theirs[name]) for name, function in ours.items() if name in theirs]
    return PackageDifferences(
        a.name,
        b.name,
        tuple(name for name in ours if name not in theirs),
        tuple(name for name in theirs if name not in ours),
        tuple(function for function in found if not function.same),
        diff_named(a.constants, b.constants, lambda name: _diff_constant(a, b, name)),
        diff_keys(a.metadata, b.metadata),
    )


def _diff_functions(a: ListedFunction, b: ListedFunction) -> FunctionDifferences:
    return FunctionDifferences(
        a.name,
        diff_keys(_tell_ports(a), _tell_ports(b)),
        diff_counts(count_listed(a), count_listed(b)),
        tuple(_list_changed(a, b)),
    )


def _tell_ports(function: ListedFunction) -> dict[str, str]:
    return {
        f"{place} {port.name}": f"{port.form.dtype} {list(port.form.shape)} {port.form.layout}".rstrip()
        for place in ("inputs", "outputs", "states")
        for port in getattr(function, place)
    }


def _list_changed(a: ListedFunction, b: ListedFunction) -> Iterator[str]:
    """Operations that are not alike, those at one place compared."""
    for one, other in zip(a.operations, b.operations, strict=False):
        if _tell(a, one) != _tell(b, other):
            yield a.call(one)


def _tell(function: ListedFunction, operation: Operation) -> tuple[Any, ...]:
    forms = [function.forms[number] for number in operation.results]
    return operation.kind, operation.operands, forms, operation.given


def _diff_constant(a: OpenAsset, b: OpenAsset, name: str) -> Pair:
    one, other = (item.known.forms or {} for item in (a, b))
    form = None
    if one[name] != other[name]:
        form = Form(name, (one[name].dtype, other[name].dtype), (one[name].shape, other[name].shape))
    if one[name].shape != other[name].shape:
        return form, None
    return form, _diff_numbers(a, b, name)


def _diff_numbers(a: OpenAsset, b: OpenAsset, name: str) -> ValueDifference | None:
    ours, theirs = (load_known_tensor(item.stored, item.known, name) for item in (a, b))

    def count() -> int | None:
        if ours.codes is None or theirs.codes is None or ours.codebook is None or theirs.codebook is None:
            return None
        if len(ours.codebook) != len(theirs.codebook):
            return None
        return int(torch.count_nonzero(ours.codes != theirs.codes))

    return diff_values(name, ours.dense, theirs.dense, count)
