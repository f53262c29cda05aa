"""What differs between two checkpoints: tensors by name, then config.json, recipe and tokenizer files.

The error is ||A - B|| / ||A||, sums in float64. Between a float model and its rotated checkpoint nearly all
weights differ, whatever the quantizer did: there, logits say more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.checkpoints.manifest import MANIFEST, read_manifest
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.source import TOKENIZER_FILES
from anequant.jobs.control import Progress, silent
from anequant.jobs.output_folder import hash_files

CHUNK = 1 << 20


@dataclass(frozen=True)
class Form:
    """Dtypes and shapes of a tensor that has another of one of them in B."""

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int | None, ...], tuple[int | None, ...]]


@dataclass(frozen=True)
class ValueDifference:
    """`relative_error` is None where A is all zeros, both errors where a value that differs is not finite.

    `codes` counts those that differ, None where one side has none or their codebooks are of other lengths.
    """

    name: str
    values: int
    relative_error: float | None
    max_abs: float | None
    codes: int | None


Pair = tuple[Form | None, ValueDifference | None]
"""How two things of one name differ: in form, in values."""


@dataclass(frozen=True)
class Differences:
    """What has a name only in one, another form, or other values; `equal` counts the rest."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    forms: tuple[Form, ...]
    values: tuple[ValueDifference, ...]
    equal: int

    @property
    def same(self) -> bool:
        return not (self.only_a or self.only_b or self.forms or self.values)


@dataclass(frozen=True)
class CheckpointDifferences:
    """`config` and `recipe` hold the keys that differ with the value in A and in B, None where it is missing;
    `recipe` is empty too where neither folder tells one. `files` are the tokenizer's that differ."""

    tensors: Differences
    config: Mapping[str, tuple[Any, Any]]
    recipe: Mapping[str, tuple[Any, Any]]
    files: tuple[str, ...]

    @property
    def same(self) -> bool:
        return self.tensors.same and not (self.config or self.recipe or self.files)


def diff_checkpoints(a: Checkpoint, b: Checkpoint, progress: Progress = silent) -> CheckpointDifferences:
    """Compare two checkpoints, one tensor of each at a time. Raises InputError for a tensor that is damaged
    or not finite."""

    def compare(name: str) -> Pair:
        one, other = a.tensors[name], b.tensors[name]
        form = None
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            form = Form(name, (one.dtype, other.dtype), (one.shape, other.shape))
        if one.shape != other.shape:
            return form, None
        return form, diff_values(name, a.read(name), b.read(name), partial(_codes, a, b, name))

    return CheckpointDifferences(
        diff_named(a.tensors, b.tensors, compare, progress),
        diff_keys(a.spec.config, b.spec.config),
        diff_keys(_recipe(a.folder), _recipe(b.folder)),
        tuple(_files_that_differ(a.folder, b.folder)),
    )


def diff_named(
    a: Collection[str], b: Collection[str], compare: Callable[[str], Pair], progress: Progress = silent
) -> Differences:
    """Collect what differs between two sets of names; `compare` tells it of a name that both have."""
    both = [name for name in a if name in b]
    found: list[Pair] = []
    for number, name in enumerate(both):
        progress(name, number / len(both))
        found.append(compare(name))
    return Differences(
        tuple(name for name in a if name not in b),
        tuple(name for name in b if name not in a),
        tuple(form for form, _ in found if form is not None),
        _sort_worst_first(value for _, value in found if value is not None),
        found.count((None, None)),
    )


def diff_values(
    name: str, a: Tensor, b: Tensor, codes: Callable[[], int | None] = lambda: None
) -> ValueDifference | None:
    """Compare tensors of one shape; None for equal values, whatever the dtype. `codes` is asked if they
    differ."""
    squares = size = largest = 0.0
    equal, finite = True, True
    for one, other in zip(*(torch.split(part.reshape(-1), CHUNK) for part in (a, b)), strict=True):
        ours, theirs = one.double(), other.double()
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        equal, off = equal and bool(same.all()), (ours - theirs).abs()[~same]
        finite = finite and bool(off.isfinite().all())
        squares += float(off.square().sum())
        size += float(ours.square().sum())
        largest = max(largest, float(off.max()) if len(off) else 0.0)
    if equal:
        return None
    relative = math.sqrt(squares / size) if finite and size > 0 else None
    return ValueDifference(name, a.numel(), relative, largest if finite else None, codes())


def _sort_worst_first(values: Iterable[ValueDifference]) -> tuple[ValueDifference, ...]:
    """Sort by relative error; what has none comes first."""
    return tuple(sorted(values, key=lambda value: -math.inf if (e := value.relative_error) is None else -e))


def diff_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def _codes(a: Checkpoint, b: Checkpoint, name: str) -> int | None:
    """Count the codes that differ between the linears whose weight has that name, where both are
    quantized."""
    linear = name.removesuffix(".weight")
    if name == linear or not all(f"{linear}.output_scales" in part.tensors for part in (a, b)):
        return None
    one, other = (load(linear, part.read, part.tensors) for part in (a, b))
    if len(one.codebook) != len(other.codebook):
        return None
    return int(torch.count_nonzero(one.codes != other.codes))


def _recipe(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        return {}
    recipe = read_manifest(folder).get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def _files_that_differ(a: Path, b: Path) -> Iterator[str]:
    for name in TOKENIZER_FILES:
        present = [(folder / name).is_file() for folder in (a, b)]
        if present[0] != present[1] or (all(present) and hash_files(a, [name]) != hash_files(b, [name])):
            yield name
