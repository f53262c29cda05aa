"""A constant of an asset of Core AI, read by our own reader: its numbers, and codes and table of a weight."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anequant.errors import UnsupportedError, quote
from anequant.inspection.asset_forms import Known, read_known
from anequant.targets.coreai.design import CODES, Constant
from anequant.targets.coreai.listed_weights import is_readable
from anequant.targets.coreai.listing import Form
from anequant.targets.coreai.stored import StoredAsset


@dataclass(frozen=True)
class AssetTensor:
    """A constant's numbers; of a weight with one table also its codes and the table. `tables` counts those of
    a weight."""

    dtype: str
    dense: Tensor
    codes: Tensor | None = None
    codebook: Tensor | None = None
    tables: int | None = None


def load_asset_tensor(asset: Path, bundle: Path | None, name: str) -> AssetTensor | None:
    """Load a constant by its name, or a linear's weight by the linear's; None where there is none of it.

    Raises as `load_known_tensor`.
    """
    stored = StoredAsset(asset)
    full = name if name in stored.blobs else name + CODES
    return load_known_tensor(stored, read_known(asset, bundle), full) if full in stored.blobs else None


def load_known_tensor(stored: StoredAsset, known: Known, name: str) -> AssetTensor:
    """Load a constant; codes are looked up where their table is known.

    Raises UnsupportedError where nobody tells what the bytes are, or for a type that is not read.
    """
    where = str(stored.path)
    forms = known.forms or {}

    def load(part: str) -> Tensor:
        form = forms.get(part)
        if form is None or not is_readable(form):
            why = known.reason if form is None else f"{form.dtype} is not read"
            why = why or "no function uses it"
            raise UnsupportedError(f"constant {quote(part)} cannot be shown: {why}", where=where)
        return stored.load(part, _as_constant(form))

    values = load(name)
    weight = next((item for item in known.weights or () if item.name == name and item.tables), None)
    if weight is None:
        return AssetTensor(forms[name].dtype, values)
    table = load(weight.parts[1])
    if table.shape[-1] != 1:
        raise UnsupportedError(f"constant {quote(name)} has a table of vectors", where=where)
    dtype, tables = forms[weight.parts[1]].dtype, weight.tables
    if tables > 1:
        return AssetTensor(dtype, _look_up(values, table[..., 0]), tables=tables)
    entries = table.reshape(-1)
    return AssetTensor(dtype, entries[values.long()], values, entries, 1)


def list_asset_tensors(asset: Path) -> list[str]:
    """The names of the constants in an asset's file, and of linears."""
    names = list(StoredAsset(asset).blobs)
    return [*names, *(name.removesuffix(CODES) for name in names if name.endswith(CODES))]


def _look_up(codes: Tensor, tables: Tensor) -> Tensor:
    """Numbers for codes of any shape, of which equal blocks have tables [blocks..., entries] of their own."""
    groups = tables.shape[:-1]
    found = torch.empty(codes.shape, dtype=tables.dtype)
    lengths = [size // count for size, count in zip(codes.shape, groups, strict=True)]
    for place in itertools.product(*map(range, groups)):
        block = tuple(
            slice(at * length, (at + 1) * length) for at, length in zip(place, lengths, strict=True)
        )
        found[block] = tables[place][codes[block].long()]
    return found


def _as_constant(form: Form) -> Constant:
    return Constant(form.dtype, tuple(size or 0 for size in form.shape))
