"""Shapes, counts and widths, as the rows of `anequant inspect` spell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
