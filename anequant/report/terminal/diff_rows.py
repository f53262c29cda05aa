"""What `anequant diff` found, as rows of (label, text)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from anequant.inspection.diff_checkpoints import Differences, ValueDifference
from anequant.inspection.diff_packages import PackageDifferences
from anequant.inspection.diff_paths import PathDifferences
from anequant.inspection.inspect_checkpoint import star_numbers
from anequant.report.terminal.inspect_rows import describe_recipe

Rows = list[tuple[str, str]]
MOST = 10
"""Rows of a list; --json has all of them."""

LONGEST = 60


def describe_differences(found: PathDifferences) -> Rows:
    """Return what differs, MOST rows of a list, and whether anything does."""
    rows: Rows = [("A", found.a), ("B", found.b)]
    if found.checkpoint is not None:
        checkpoint = found.checkpoint
        rows += _differences("tensors", checkpoint.tensors)
        rows += _keys("config", checkpoint.config) + _recipe(checkpoint.recipe)
        rows += [("files", f"{name} differs or is on one side only") for name in checkpoint.files]
    rows += _keys("meta.yaml", found.set)
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        rows += [("package", f"{name} is in {side} only") for name in names]
    for package in found.packages:
        rows += _package(package)
    if found.logits is not None:
        own = found.logits
        text = f"KL {own.kl:.4g}, same top token {own.top1:.1%}, largest difference {own.max_abs:.3g}"
        rows.append(("logits", f"{text}, on {own.tokens} tokens"))
    return [*rows, ("", "nothing differs" if found.same else "they differ")]


def _package(package: PackageDifferences) -> Rows:
    both = package.a if package.a == package.b else f"{package.a} and {package.b}"
    if package.same:
        return [("package", f"{both}: the same")]
    rows: Rows = [("package", both)]
    for side, names in (("A", package.only_a), ("B", package.only_b)):
        rows += [("  function", f"{name} is in {side} only") for name in names]
    for function in package.functions:
        rows.append(("  function", function.name))
        rows += _keys("  tensors", function.tensors)
        rows += [
            ("  operations", f"{a} {kind} in A, {b} in B") for kind, (a, b) in function.operations.items()
        ]
        if function.changed:
            rows.append(
                ("  operations", f"{len(function.changed)} are not alike: {_list_names(function.changed)}")
            )
    return rows + _differences("  constants", package.constants) + _keys("  metadata", package.metadata)


def _differences(label: str, found: Differences) -> Rows:
    rows: Rows = [(label, f"{found.equal} are equal, {len(found.values)} have other values")]
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            rows.append(("", f"{len(names)} only in {side}: {_patterns(names)}"))
    for words, unlike in _forms(found).items():
        rows.append(("", f"{len(unlike)} are {words}: {_patterns(unlike)}"))
    width = max((len(value.name) for value in found.values[:MOST]), default=0)
    rows += [("", f"{value.name:<{width}}  {_error(value)}") for value in found.values[:MOST]]
    return rows + _more(len(found.values), "with other values")


def _forms(found: Differences) -> dict[str, list[str]]:
    """Group the names of what has the same two dtypes or shapes, by these in words."""
    forms: dict[str, list[str]] = {}
    for form in found.forms:
        parts = [pair for pair in (form.dtypes, form.shapes) if pair[0] != pair[1]]
        words = ", ".join(f"{_value(a)} in A and {_value(b)} in B" for a, b in parts) or "of other tables"
        forms.setdefault(words, []).append(form.name)
    return forms


def _recipe(keys: Mapping[str, tuple[Any, Any]]) -> Rows:
    """Return the keys that differ, or the whole recipe where only one side tells it."""
    for own, other, side in ((0, 1, "A"), (1, 0, "B")):
        if keys and all(pair[other] is None for pair in keys.values()):
            words = describe_recipe({key: pair[own] for key, pair in keys.items()})
            return [("recipe", f"only {side} tells one: {words}"), *_rotated_otherwise(keys)]
    return _keys("recipe", keys) + _rotated_otherwise(keys)


def _rotated_otherwise(keys: Mapping[str, tuple[Any, Any]]) -> Rows:
    if not any(key in keys and keys[key] != (None, "none") for key in ("r1", "r2")):
        return []
    return [("", "they are rotated differently, so weights differ whatever rounding did: compare --logits")]


def _more(count: int, what: str) -> Rows:
    return [("", f"and {count - MOST} more {what}")] if count > MOST else []


def _error(value: ValueDifference) -> str:
    if value.max_abs is None:
        return "off by values that are not finite"
    relative = "off" if value.relative_error is None else f"off by {value.relative_error:.2%}"
    codes = "" if value.codes is None else f", {value.codes} of {value.values} codes"
    return f"{relative}, at most {value.max_abs:.3g}{codes}"


def _patterns(names: Sequence[str]) -> str:
    """Return names as one where they differ in a number only, with how often it occurs."""
    counts: dict[str, int] = {}
    for name in names:
        counts[star_numbers(name)] = counts.get(star_numbers(name), 0) + 1
    return _list_names([name if count == 1 else f"{count} {name}" for name, count in counts.items()])


def _keys(label: str, keys: Mapping[str, tuple[Any, Any]]) -> Rows:
    return [(label, f"{key}: {_value(a)} in A, {_value(b)} in B") for key, (a, b) in keys.items()]


def _value(value: Any) -> str:
    if value is None:
        return "nothing"
    text = (value or "''") if isinstance(value, str) else json.dumps(value, default=list)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _list_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
