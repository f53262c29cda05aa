"""The only place that prints: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from anequant.cli.live import Display, Lines, Nothing, bar
from anequant.errors import AnequantError, UsageError
from anequant.jobs.control import Progress, Run

if TYPE_CHECKING:
    from anequant.report.terminal.tables import Table

SHOW_AFTER = 2.0
LINE_EVERY = 10.0
LEAST_ROOM, CONTINUED, FALLBACK = 30, 4, 80
"""Columns: a terminal with fewer for a text wraps by itself; the indentation of what is
wrapped here; those of a terminal that does not tell."""

UNLIMITED = 10_000
"""Columns that any table fits into."""


@contextmanager
def libraries(speak: bool) -> Iterator[None]:
    """In here libraries do not warn unless they are to `speak`.

    What they say of themselves, of tensors that they do not know or of each other's versions is no part of a
    command's answer.
    """
    if speak:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class Console:
    """How a command talks: `json` replaces the text by one JSON object, `quiet` drops the progress and
    the text."""

    json: bool = False
    quiet: bool = False

    def result(self, values: dict[str, Any], rows: Sequence[tuple[str, str]]) -> None:
        """Print a command's outcome, as JSON or as aligned rows of (label, text)."""
        if self.json:
            print(_json(values))
        elif not self.quiet:
            width = max((len(label) for label, _ in rows), default=0)
            for label, text in rows:
                for line in _row(f"{_printable(label):<{width}}  ", _printable(text), sys.stdout):
                    print(line)

    def table(self, values: dict[str, Any], table: Table) -> None:
        """Print as `result` does, with the table's lines before its rows: drawn on a terminal, else with
        tabs."""
        if not self.json and not self.quiet:
            if sys.stdout.isatty():
                _draw(table)
            else:
                for line in (table.columns, *table.lines):
                    print("\t".join(map(_printable, line)))
        self.result(values, table.rows)

    def text(self, piece: str) -> None:
        """Print a part of a running text, at once and as it is: a model says what it likes."""
        if not self.json and not self.quiet:
            print(piece, end="", flush=True)

    def turns(self) -> Iterator[str]:
        """Yield lines of stdin that are not blank, until it ends; a terminal is prompted."""
        asks = sys.stdin.isatty() and not (self.json or self.quiet)
        while True:
            if asks:
                print("> ", end="", flush=True)
            try:
                line = sys.stdin.readline()
            except UnicodeDecodeError as error:
                raise UsageError(f"the input is not UTF-8: {error}", remedy="write it in UTF-8") from error
            if not line:
                return
            if line.strip():
                yield line.rstrip("\n")

    def note(self, text: str) -> None:
        """Print a line on stderr, in several where the terminal is too narrow."""
        if not self.quiet:
            for line in _row("", _printable(text), sys.stderr):
                _tell(line)

    def command(self, label: str, words: Sequence[str]) -> None:
        """Print a command on stderr, in one line to be copied."""
        if not self.quiet:
            _tell(_printable(f"{label}: {shlex.join(words)}"))

    def error(self, error: AnequantError) -> None:
        """Print what, where and what to do, a line each; with `json` also as an object on stdout."""
        if self.json:
            parts = {"what": error.what, "where": error.where, "remedy": error.remedy}
            print(_json({"error": {**parts, "exit_code": error.exit_code}}))
        for label, text in (("error", error.what), ("  where", error.where), ("  do", error.remedy)):
            for line in _row(f"{label}: ", _printable(text), sys.stderr) if text else ():
                _tell(line)

    @contextmanager
    def job(self, title: str, *, force: bool, resume: bool, max_memory: int | None = None) -> Iterator[Run]:
        """How a job that can be resumed is seen and steered.

        It stops after the unit of work in which Ctrl-C is pressed, and at once after a second time.
        """
        pressed = False

        def press(number: int, frame: FrameType | None) -> None:
            nonlocal pressed
            if pressed:
                raise KeyboardInterrupt
            pressed = True
            self.note("stopping when this unit of work is done; press Ctrl-C again to stop at once")

        before = signal.signal(signal.SIGINT, press)
        try:
            with self._display(title) as seen:
                yield Run(
                    Progress(seen.report),
                    force=force,
                    resume=resume,
                    max_memory=max_memory,
                    note=self.note,
                    stopping=lambda: pressed,
                    planned=seen.plan,
                    finished=seen.finished,
                )
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def watched(self, title: str, *, force: bool) -> Iterator[Run]:
        """As `job`, for one that Ctrl-C ends at once; its units are few and each has a line."""
        with self._display(title, each=True) as seen:
            yield Run(
                Progress(seen.report), force=force, note=self.note, planned=seen.plan, finished=seen.finished
            )

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """A Progress for what has no units, or does not tell them."""
        with self._display(title) as seen:
            yield Progress(seen.report)

    def _line(self, text: str) -> None:
        _tell(_printable(text))

    def _display(self, title: str, *, each: bool = False) -> AbstractContextManager[Display]:
        """On a terminal a bar, else a line now and then; both after two seconds, or with `each` a line for
        every unit from the first on."""
        if self.quiet:
            return nullcontext(Nothing())
        if sys.stderr.isatty():
            return bar(title, _printable, 0.0 if each else SHOW_AFTER)
        return nullcontext(Lines(title, self._line, SHOW_AFTER, LINE_EVERY, each=each))


def _tell(line: str) -> None:
    """Print a line on stderr, with its end in one piece: Ctrl-C between the two would glue the next one to
    it."""
    print(f"{line}\n", end="", file=sys.stderr, flush=True)


def escape_what_has_no_code() -> None:
    """Have stdout show characters that its encoding lacks as stderr does, as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _draw(shown: Table) -> None:
    """Print a table; where the terminal is too narrow for its longest line, a row of words for each."""
    from rich.console import Console as RichConsole
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for number, column in enumerate(shown.columns):
        table.add_column(column, justify="left" if number < 2 else "right", overflow="fold")
    for line in shown.lines:
        table.add_row(*(Text(_printable(cell)) for cell in line))
    rich = RichConsole()
    if Measurement.get(rich, rich.options.update(max_width=UNLIMITED), table).minimum <= rich.width:
        rich.print(table)
        return
    for first, *others in shown.lines:
        named = (f"{column} {cell}" for column, cell in zip(shown.columns[1:], others, strict=True) if cell)
        for text in _row(f"{_printable(first)}  ", _printable(", ".join(named)), sys.stdout):
            print(text)


def _row(label: str, text: str, stream: TextIO) -> list[str]:
    """Return a label and its text, in several indented lines where a terminal is too narrow."""
    room = _columns(stream) - len(label)
    if not stream.isatty() or len(text) <= room or room < LEAST_ROOM:
        return [label + text]
    indent = " " * CONTINUED
    first, *others = textwrap.wrap(text, room, subsequent_indent=indent, break_on_hyphens=False)
    return [label + first, *(" " * len(label) + line for line in others)]


def _says(stream: TextIO, text: str) -> bool:
    """Whether the encoding of a stream has all characters of a text."""
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _columns(stream: TextIO) -> int:
    """Return the width of the terminal that `stream` is, which stdout need not be."""
    if not os.environ.get("COLUMNS"):
        with suppress(OSError):
            return os.get_terminal_size(stream.fileno()).columns or FALLBACK
    return shutil.get_terminal_size().columns


def _json(values: dict[str, Any]) -> str:
    """Return one line of JSON in which nothing acts on a terminal: what does not print there is escaped."""
    text = json.dumps(values, ensure_ascii=False, sort_keys=True)
    if not _says(sys.stdout, text):
        text = json.dumps(values, sort_keys=True)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def _printable(text: str) -> str:
    """Make control characters from file names and tensor names visible."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
