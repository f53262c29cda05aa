"""Shapes, counts and widths, as the rows of `anequant inspect` spell them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
SIZES = re.compile(r"((?:_\d+)+)$")
"""What functions of an asset that differ in sizes alone end in."""


def format_shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def show_sizes(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def join_alike_ports(specs: Sequence[Any]) -> list[tuple[list[str], str]]:
    """Group neighbours of the same dtype and shape, as the parts of a head are."""
    groups: list[tuple[list[str], str]] = []
    for spec in specs:
        text = f"{spec.dtype} {show_sizes(spec.shape)}"
        if groups and groups[-1][1] == text and groups[-1][0][-1].rstrip("0123456789") in spec.name:
            groups[-1][0].append(spec.name)
        else:
            groups.append(([spec.name], text))
    return groups


def format_count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return str(number)


def describe_widths(bits: float, stored: float, what: str) -> str:
    """Bits of a value, and with what is stored beside it where that makes a difference."""
    whole = "" if f"{bits:.2f}" == f"{stored:.2f}" else f" ({stored:.2f} with {what})"
    return f"{bits:.2f} bits{whole}"


def group_by_kind(functions: Sequence[Item], name: Callable[[Item], str]) -> list[list[Item]]:
    """Group functions by their names without the sizes at the end, in order of the first."""
    groups: dict[str, list[Item]] = {}
    for function in functions:
        groups.setdefault(SIZES.sub("", name(function)), []).append(function)
    return list(groups.values())


def describe_kind(names: Sequence[str]) -> str:
    """What functions of one kind are called, as in "extend, 2 for 256 x 8, 512 x 8; extend_512_8 is"."""
    if len(names) == 1:
        return names[0]
    sizes = ", ".join(_read_sizes(name) for name in names)
    return f"{SIZES.sub('', names[-1])}, {len(names)} for {sizes}; {names[-1]} is"


def _read_sizes(name: str) -> str:
    found = SIZES.search(name)
    return found[1][1:].replace("_", " x ") if found is not None else "any"
