"""How a command ends when something fails or is interrupted, and what it needs before it begins."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from anequant.cli.console import Console, escape_what_has_no_code, libraries
from anequant.errors import (
    INTERRUPTED,
    AnequantError,
    Interrupted,
    UnsupportedError,
    UsageError,
    as_error,
    is_unicode,
    quote,
    torch_memory,
)
from anequant.jobs.interrupts import NOTHING_LEFT, between_imports

PROGRAM = "anequant"
NO_RESUME = "--no-resume"


@contextmanager
def ending_as_documented(console: Console, debug: bool, options: Mapping[str, Any]) -> Iterator[None]:
    """In here an error is three lines and an exit code instead of a traceback, unless `debug`, and Ctrl-C
    ends in the words that go on. `options` are what the command was given, by name."""
    escape_what_has_no_code()
    try:
        with between_imports(), torch_memory(), libraries(debug):
            _require_docstrings()
            _require_utf8(options)
            yield
    except (AnequantError, MemoryError, OSError) as failure:
        if debug or isinstance(failure, BrokenPipeError):  # click ends quietly when a pipe is closed
            raise
        error = as_error(failure)
        console.error(error)
        sys.exit(error.exit_code)
    except Interrupted as stop:
        words = stop.command or [word for word in sys.argv[1:] if word != NO_RESUME]
        console.note(f"interrupted; {stop.kept}")
        console.command("to go on", [PROGRAM, *words])
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        console.note(NOTHING_LEFT)
        sys.exit(INTERRUPTED)


def _require_docstrings() -> None:
    """Raises UnsupportedError under `python -OO`, which leaves them out: transformers reads its own."""
    if sys.flags.optimize > 1:
        raise UnsupportedError(
            "this Python drops docstrings (-OO, PYTHONOPTIMIZE=2), and transformers does not load without",
            remedy="unset PYTHONOPTIMIZE, or set it to 1",
        )


def _require_utf8(options: Mapping[str, Any]) -> None:
    """Raises UsageError for an argument that is no Unicode: no library reads a path or writes a name that is
    none, and no tokenizer a text."""
    for name, given in options.items():
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not is_unicode(str(value)):
                raise UsageError(
                    f"{quote(str(value))} is not UTF-8",
                    where=name.replace("_", "-"),
                    remedy="write it in UTF-8; a file or folder has to be renamed",
                )
