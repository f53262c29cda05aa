"""Results as JSON holds them, and back: dataclasses, tuples and mappings of plain values."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any


def to_plain(value: Any) -> Any:
    """Return the value as it comes back from JSON, dataclasses as objects by field."""
    return json.loads(json.dumps(value, default=_fields))


def from_plain(kind: Any, value: Any) -> Any:
    """Return the value of type `kind` that `to_plain` made `value` of.

    Takes dataclasses, tuple[X, ...] and tuple[X, Y], list[X], Mapping and dict, X | None, and plain types;
    keys of mappings are converted too, since JSON has strings alone.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else from_plain(inner, value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind) if field.init]
        return kind(**{name: from_plain(hints[name], value[name]) for name in names})
    if origin is tuple and arguments[1:] == (...,):
        return tuple(from_plain(arguments[0], item) for item in value)
    if origin is tuple:
        return tuple(from_plain(inner, item) for inner, item in zip(arguments, value, strict=True))
    if origin is list:
        return [from_plain(arguments[0], item) for item in value]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {arguments[0](key): from_plain(arguments[1], item) for key, item in value.items()}
    return value


def _fields(value: Any) -> Any:
    """Return a dataclass as an object by field, for JSON; raises TypeError for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} is no plain value")
