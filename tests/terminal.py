"""A terminal of a given width, and what a program wrote to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import traceback
from collections.abc import Callable

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


LONGEST = 120
"""Seconds after which a fork is given up."""


def on_terminal(columns: int, work: Callable[[], None], **environment: str) -> tuple[int, str]:
    """The exit code of a fork of this process, and what it wrote to a terminal of that width."""
    end, terminal = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    child = os.fork()
    if not child:
        signal.alarm(LONGEST)
        for number in range(3):
            os.dup2(terminal, number)
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            os.environ.pop(name, None)
        os.environ.update({"TERM": "xterm-256color", **environment})
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        code = 99
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(terminal)
    written = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while piece := os.read(end, 1 << 16):
            written += piece
    os.close(end)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written.decode()


def rows(written: str) -> list[str]:
    """What was written row by row, also what was overwritten since, without escape sequences."""
    return [row.rstrip() for row in re.split(r"[\r\n]+", ESCAPE.sub("", written)) if row.strip()]
