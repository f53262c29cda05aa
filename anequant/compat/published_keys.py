"""Keys of published files, checked against a table: what is not in it is an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.errors import UnsupportedError, UsageError, did_you_mean
from anequant.recipe import TYPE_NAMES


@dataclass(frozen=True)
class Word:
    """What one key of a published file may say.

    kind     type of the value; None where something else checks it
    only     the values that have a counterpart here; None for any
    unused   why the value has no effect here; empty where it has one
    granted  the value that anequant follows all the same, so that nobody need be told
    """

    kind: type | None = None
    only: tuple[Any, ...] | None = None
    unused: str = ""
    granted: Any = None


def checked_words(values: Mapping[str, Any], words: Mapping[str, Word], path: Path) -> tuple[str, ...]:
    """Check the values of a file; returns a line for every reason why some of them have no effect.

    Raises UsageError for a key that is not in `words` or a value of another type, UnsupportedError for one
    that has no counterpart.
    """
    unused: dict[str, list[str]] = {}
    for key, value in values.items():
        if key not in words:
            raise UsageError(f"unknown key '{key}' in '{path}'", remedy=did_you_mean(key, words))
        word = words[key]
        if word.kind is not None and not _is_a(value, word.kind):
            wanted = TYPE_NAMES[word.kind]
            raise UsageError(f"key '{key}' in '{path}' must be {wanted}, not {value!r}")
        if word.only is not None and value not in word.only:
            known = " or ".join(map(repr, word.only))
            raise UnsupportedError(f"key '{key}' in '{path}' is {value!r}", remedy=f"only {known} is known")
        if word.unused and (word.granted is None or value != word.granted):
            unused.setdefault(word.unused, []).append(key)
    return tuple(f"{reason}: no use for {', '.join(keys)}" for reason, keys in unused.items())


def _is_a(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)
