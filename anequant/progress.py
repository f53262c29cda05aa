"""How long work tells whoever watches; the console decides what to show."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""(what is being done, share done from 0 to 1)"""


def silent(what: str, done: float) -> None:
    """A Progress that shows nothing."""
