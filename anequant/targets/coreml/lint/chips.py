"""The chips that a rule may depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """`axis` is the longest axis of a tensor, `w8a8` whether 8-bit activations are faster than float16, and
    `integers` whether direct integer weights were measured to be."""

    name: str
    axis: int
    w8a8: bool = False
    integers: bool = False


CHIPS = {
    chip.name: chip
    for chip in (
        *(Chip(name, 16384) for name in ("any", "a14", "a15", "a16", "m1", "m2", "m3")),
        Chip("a17", 16384, w8a8=True),
        *(Chip(name, 65536, w8a8=True) for name in ("a18", "a19", "m4", "m6")),
        Chip("m5", 65536, w8a8=True, integers=True),
    )
}
"""Each chip, by generation of its engine (H13 to H15: 16384; H16 on: 65536). `any` is the strictest. The a17
is not placed by the source for axes and so counts as the older one; 8-bit activations pay off from it on
(Apple)."""
