"""Every failure a user can cause or meet, each with its documented exit code.

    AnequantError
    ├── UsageError         2    a wrong option, recipe or output path
    ├── InputError         3    the model's files are missing, damaged or contradict each other
    ├── UnsupportedError   4    a sound input that this version cannot handle
    ├── ResourceError      5    not enough disk or memory
    └── VerificationError  6    what was written is not what was meant

Success is 0; an interrupt is 130. Every message has three parts: what went wrong (naming the thing),
where (file, tensor), and what to do about it.
"""

from __future__ import annotations

import difflib
import errno
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class AnequantError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        return "; ".join(part for part in (self.what, self.where, self.remedy) if part)


class UsageError(AnequantError):
    exit_code = 2


class InputError(AnequantError):
    exit_code = 3


class UnsupportedError(AnequantError):
    exit_code = 4


class ResourceError(AnequantError):
    exit_code = 5


class VerificationError(AnequantError):
    exit_code = 6


OS_REMEDIES = {
    errno.EACCES: "check who owns it and its permissions",
    errno.EDQUOT: "free disk space",
    errno.EFBIG: "allow larger files (ulimit -f unlimited), or name a folder on a disk that takes them",
    errno.EIO: "check the disk",
    errno.EMFILE: "allow more open files (ulimit -n 4096)",
    errno.ENAMETOOLONG: "use shorter names",
    errno.ENFILE: "close other programs",
    errno.ENOSPC: "free disk space",
    errno.EPERM: "check who owns it and its permissions",
    errno.EROFS: "name a folder on a disk that may be written to",
}


def as_error(failure: AnequantError | MemoryError | OSError) -> AnequantError:
    """Return the error itself, or what the system refused as a ResourceError."""
    if isinstance(failure, AnequantError):
        return failure
    if isinstance(failure, MemoryError):
        return ResourceError("not enough memory", where=str(failure), remedy="close other programs")
    remedy = OS_REMEDIES.get(failure.errno or 0, "")
    return ResourceError(failure.strerror or str(failure), where=str(failure.filename or ""), remedy=remedy)


@contextmanager
def torch_memory() -> Iterator[None]:
    """In here an allocation that torch could not make is a MemoryError; torch says so by a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        _, found, asked = str(error).partition("DefaultCPUAllocator: ")
        if not found:
            raise
        raise MemoryError(asked.splitlines()[0]) from error


INTERRUPTED = 130


class Interrupted(KeyboardInterrupt):
    """An interrupt after which the same job goes on where it stopped.

    `kept` says what is there of it, and `command` are the words that go on, None for those of the job itself.
    """

    def __init__(self, kept: str, command: Sequence[str] | None = None) -> None:
        super().__init__(kept)
        self.kept = kept
        self.command = command


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a suggestion for a misspelt word, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word[:80], names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or the name of its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_unicode(text: str) -> bool:
    """Whether a text is one: Python keeps bytes that are no UTF-8 as surrogates, which nothing else takes."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


LONGEST_NAME = 200


def quote(value: object) -> str:
    """Return a value for a message: a name in quotes, short, without characters that a terminal would
    obey."""
    if not isinstance(value, str):
        return reprlib.repr(value)
    text = value if len(value) <= LONGEST_NAME else f"{value[:60]}... ({len(value)} characters)"
    return f"'{text}'" if text.isprintable() else ascii(text)
