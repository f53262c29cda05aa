"""What the constants of online rotations are called, for processes that need nothing else of them."""

from __future__ import annotations

QUERY, KEY, FFN = "r3_query", "r3_key", "r4"
"""What the rotations are called: `name_factor` tells their constants."""


def name_factor(name: str, number: int) -> str:
    """Return the name of the constant that is a rotation's factor."""
    return f"{name}_factor_{number + 1}"
