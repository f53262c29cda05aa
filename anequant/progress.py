"""How long work tells whoever watches; the console decides what to show."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""(what is being done, share done from 0 to 1)"""


def silent(what: str, done: float) -> None:
    """A Progress that shows nothing."""


def part_of(progress: Progress, step: str, start: float, end: float) -> Progress:
    """A Progress for one step that takes the share from `start` to `end` of the whole."""

    def report(what: str, done: float) -> None:
        progress(f"{step}: {what}", start + (end - start) * done)

    return report
