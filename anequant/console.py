"""The only place that prints: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from anequant.errors import AnequantError
from anequant.progress import Control, Progress

SHOW_AFTER = 2.0
LINE_EVERY = 10.0
LEAST_ROOM, CONTINUED = 30, 4
"""Columns: a terminal with fewer for a text wraps by itself; the indentation of what is wrapped here."""


@dataclass(frozen=True)
class Console:
    """How a command talks: `json` replaces the text by one JSON object, `quiet` drops the progress and
    the text."""

    json: bool = False
    quiet: bool = False

    def result(self, values: dict[str, Any], rows: Sequence[tuple[str, str]]) -> None:
        """A command's outcome, as JSON or as aligned rows of (label, text)."""
        if self.json:
            print(_json(values))
        elif not self.quiet:
            width = max((len(label) for label, _ in rows), default=0)
            for label, text in rows:
                for line in _row(f"{_printable(label):<{width}}  ", _printable(text)):
                    print(line)

    def table(
        self,
        values: dict[str, Any],
        columns: Sequence[str],
        lines: Sequence[Sequence[str]],
        rows: Sequence[tuple[str, str]],
    ) -> None:
        """As `result`, with a table of `lines` before the rows: drawn on a terminal, else with tabs."""
        if not self.json and not self.quiet:
            if sys.stdout.isatty():
                _draw(columns, lines)
            else:
                for line in (columns, *lines):
                    print("\t".join(map(_printable, line)))
        self.result(values, rows)

    def text(self, piece: str) -> None:
        """Part of a running text, shown at once and as it is: a model says what it likes."""
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
            print(_printable(text), file=sys.stderr)

    def error(self, error: AnequantError) -> None:
        """What, where and what to do, a line each; with `json` also as an object on stdout."""
        if self.json:
            parts = {"what": error.what, "where": error.where, "remedy": error.remedy}
            print(_json({"error": {**parts, "exit_code": error.exit_code}}))
        print(f"error: {_printable(error.what)}", file=sys.stderr)
        for label, text in (("where", error.where), ("do", error.remedy)):
            if text:
                print(f"  {label}: {_printable(text)}", file=sys.stderr)

    @contextmanager
    def control(self, resume: bool, max_memory: int | None = None) -> Iterator[Control]:
        """A Control that stops after the unit of work in which Ctrl-C is pressed, at once after a second."""
        pressed = False

        def press(number: int, frame: FrameType | None) -> None:
            nonlocal pressed
            if pressed:
                raise KeyboardInterrupt
            pressed = True
            self.note("stopping when this unit of work is done; press Ctrl-C again to stop at once")

        before = signal.signal(signal.SIGINT, press)
        try:
            yield Control(resume, self.note, lambda: pressed, max_memory)
        finally:
            signal.signal(signal.SIGINT, before)

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


def _draw(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table whose first two columns are words, and the others numbers."""
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    for line in lines:
        table.add_row(*(Text(_printable(cell)) for cell in line))
    RichConsole().print(table)


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
        TextColumn("{task.description}", markup=False),
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
        bar.update(task, description=f"{title}: {_printable(what)}", completed=done)
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
        print(f"{title}: {_printable(what)}, {done:.0%}, {elapsed:.0f} s{left}", file=sys.stderr)

    return report


def _row(label: str, text: str) -> list[str]:
    """A label and its text, which a terminal that is too narrow gets in several indented lines."""
    room = shutil.get_terminal_size().columns - len(label)
    if not sys.stdout.isatty() or len(text) <= room or room < LEAST_ROOM:
        return [label + text]
    indent = " " * CONTINUED
    first, *others = textwrap.wrap(text, room, subsequent_indent=indent, break_on_hyphens=False)
    return [label + first, *(" " * len(label) + line for line in others)]


def _json(values: dict[str, Any]) -> str:
    """One line of JSON in which nothing acts on a terminal: what does not print is escaped."""
    text = json.dumps(values, ensure_ascii=False, sort_keys=True)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def _printable(text: str) -> str:
    """Control characters from file names and tensor names, made visible."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
