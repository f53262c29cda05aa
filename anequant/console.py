"""The only place that prints: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from anequant.errors import AnequantError
from anequant.progress import Progress

SHOW_AFTER = 2.0
LINE_EVERY = 10.0


@dataclass(frozen=True)
class Console:
    """How a command talks: `json` replaces the text by one JSON object, `quiet` drops the progress and
    the text."""

    json: bool = False
    quiet: bool = False

    def result(self, values: dict[str, Any], rows: Sequence[tuple[str, str]]) -> None:
        """A command's outcome, as JSON or as aligned rows of (label, text)."""
        if self.json:
            print(json.dumps(values, ensure_ascii=False, sort_keys=True))
        elif not self.quiet:
            width = max((len(label) for label, _ in rows), default=0)
            for label, text in rows:
                print(f"{label:<{width}}  {text}")

    def text(self, piece: str) -> None:
        """Part of a running text, shown at once."""
        if not self.json and not self.quiet:
            print(piece, end="", flush=True)

    def turns(self) -> Iterator[str]:
        """Lines of stdin that are not blank, until it ends; a terminal is prompted."""
        asks = sys.stdin.isatty() and not (self.json or self.quiet)
        while True:
            if asks:
                print("> ", end="", flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            if line.strip():
                yield line.rstrip("\n")

    def note(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def error(self, error: AnequantError) -> None:
        """What, where and what to do, a line each; with `json` also as an object on stdout."""
        if self.json:
            parts = {"what": error.what, "where": error.where, "remedy": error.remedy}
            print(json.dumps({"error": {**parts, "exit_code": error.exit_code}}, ensure_ascii=False))
        print(f"error: {_printable(error.what)}", file=sys.stderr)
        for label, text in (("where", error.where), ("do", error.remedy)):
            if text:
                print(f"  {label}: {_printable(text)}", file=sys.stderr)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """A Progress that appears after two seconds: a bar on a terminal, else a line now and then."""
        if self.quiet:
            yield lambda what, done: None
        elif sys.stderr.isatty():
            with _bar(title) as report:
                yield report
        else:
            yield _lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = RichProgress(*columns, console=RichConsole(stderr=True), transient=True)
    task = bar.add_task(title, total=1.0)
    begun = time.monotonic()
    shown = False

    def report(what: str, done: float) -> None:
        nonlocal shown
        bar.update(task, description=f"{title}: {what}", completed=done)
        if not shown and time.monotonic() - begun > SHOW_AFTER:
            shown = True
            bar.start()

    try:
        yield report
    finally:
        bar.stop()


def _lines(title: str) -> Progress:
    begun = time.monotonic()
    due = begun + SHOW_AFTER

    def report(what: str, done: float) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due:
            return
        due = now + LINE_EVERY
        elapsed = now - begun
        left = f", about {elapsed * (1 - done) / done:.0f} s left" if done > 0.02 else ""
        print(f"{title}: {what}, {done:.0%}, {elapsed:.0f} s{left}", file=sys.stderr)

    return report


def _printable(text: str) -> str:
    """Control characters from file names and tensor names, made visible."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
