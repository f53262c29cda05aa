"""Ctrl-C at moments at which KeyboardInterrupt would be lost: while modules are imported.

Libraries try imports and take any failure, an interrupt too, for a package that is not there.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from anequant.errors import INTERRUPTED

NOTHING_LEFT = "interrupted; no output was left behind"
AGAIN = 0.05
"""Seconds until an interrupt that came during an import is tried again."""

IMPORTING = "<frozen importlib._bootstrap>"
"""The file that the frames of an import are of."""


def leave_until_begun() -> None:
    """Let Ctrl-C end the process at once, until `between_imports` is entered; ignored, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def leave(number: int, frame: FrameType | None) -> None:
    """End the process; the handler for a time in which nothing is begun."""
    os.write(2, f"{NOTHING_LEFT}\n".encode())
    os._exit(INTERRUPTED)


@contextmanager
def between_imports() -> Iterator[None]:
    """In here Ctrl-C is a KeyboardInterrupt as ever, but one that waits for the end of an import.

    A SIGINT that is ignored stays so. After a block that followed `leave`, Ctrl-C changes nothing more.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before not in (leave, signal.default_int_handler):
        yield
        return
    outside = _imports(sys._getframe())

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _imports(frame) == outside:
            raise KeyboardInterrupt
        again = threading.Timer(AGAIN, _thread.interrupt_main)
        again.daemon = True
        again.start()

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if before is leave else before)


def _imports(frame: FrameType | None) -> int:
    """Count the frames of a stack that are Python's own, importing."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == IMPORTING
        frame = frame.f_back
    return count
