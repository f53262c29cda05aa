"""The blobs of MLIR bytecode, read and written without the runtime and with one of them in memory at a time.

A file (llvm.org, "MLIR Bytecode Format", version 6) is a magic, a version, a producer and sections, each an
id, a length and bytes. Numbers are prefix varints: the count of trailing zero bits of the first byte tells
how many bytes follow. A resource lies in section 5 as

    alignment, size, padding of 0xCB up to a multiple of the alignment, bytes

and section 6 lists, for every group of them, each one's name (an index into the strings of section 0), the
length of that, and its kind, 0 for a blob.

Apple's writer needs all constants in memory twice. So it is given placeholders instead, a few bytes that
differ (constants with equal bytes are merged), and `fill_blobs` copies its file with the constants in their
place: byte for byte what that writer makes of the constants themselves.
"""

from __future__ import annotations

import hashlib
import io
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from anequant.errors import InputError

MAGIC = b"ML\xefR"
STRINGS, BLOBS, BLOB_LIST = 0, 5, 6
ALIGNED = 0x80
PADDING = b"\xcb"
LARGEST_ALIGNMENT = 4096
BLOB = 0
PIECE = 1 << 24
"""Bytes of a file that are held at once."""

Content = Callable[[str], Iterable[bytes | memoryview]]
"""The bytes of a blob, by its name, in pieces."""


@dataclass(frozen=True)
class Section:
    """A section's bytes in the file, from `start` up to `end`; `alignment` of where it starts, 1 for none."""

    id: int
    start: int
    end: int
    alignment: int


@dataclass(frozen=True)
class Blob:
    """A resource's bytes in the file, and the alignment that it was written with."""

    name: str
    start: int
    size: int
    alignment: int


@dataclass(frozen=True)
class Bytecode:
    """A file's sections in their order, all after the `head`, and its blobs in theirs."""

    head: bytes
    sections: tuple[Section, ...]
    blobs: tuple[Blob, ...]


class _Reader:
    """Reads numbers out of bytes, from a position on; raises ValueError where they end."""

    def __init__(self, data: bytes | mmap.mmap | memoryview, start: int, end: int) -> None:
        self.data, self.place, self.end = data, start, end

    def byte(self) -> int:
        return self.take(1)[0]

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.end - self.place:
            raise ValueError("the file ends too early")
        self.place += count
        return bytes(self.data[self.place - count : self.place])

    def number(self) -> int:
        first = self.byte()
        if first == 0:
            return int.from_bytes(self.take(8), "little")
        more = (first & -first).bit_length() - 1
        return int.from_bytes(bytes([first]) + self.take(more), "little") >> (more + 1)


def write_number(value: int) -> bytes:
    """A number as a prefix varint."""
    for more in range(8):
        if value < 1 << 7 * (more + 1):
            return ((value << 1 | 1) << more).to_bytes(more + 1, "little")
    return b"\0" + value.to_bytes(8, "little")


def read_bytecode(path: Path) -> Bytecode:
    """Read where everything lies; raises InputError for a file that is none, or that ends too early."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data)
    except (OSError, ValueError) as error:
        raise InputError(f"'{path.name}' is no whole MLIR bytecode: {error}", where=str(path)) from error


def _parse(data: mmap.mmap) -> Bytecode:
    reader = _Reader(data, 0, len(data))
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin as such")
    reader.number()
    while reader.byte():
        pass
    head = bytes(data[: reader.place])
    sections = []
    while reader.place < reader.end:
        kind, length, alignment = reader.byte(), reader.number(), 1
        if kind & ALIGNED:
            alignment = reader.number()
            if not 1 <= alignment <= LARGEST_ALIGNMENT:
                raise ValueError(f"a section has the alignment {alignment}")
            reader.take(-reader.place % alignment)
        sections.append(Section(kind & ~ALIGNED, reader.place, reader.place + length, alignment))
        reader.take(length)
    found = {section.id: section for section in sections}
    missing = {STRINGS, BLOBS, BLOB_LIST} - found.keys()
    if missing or len(found) != len(sections):
        raise ValueError(f"section {min(missing, default=0)} is not there once")
    strings = _read_strings(data, found[STRINGS])
    blobs = tuple(_read_blobs(data, found[BLOB_LIST], found[BLOBS], strings))
    return Bytecode(head, tuple(sections), blobs)


def _read_strings(data: mmap.mmap, section: Section) -> list[str]:
    """The strings; their lengths come first, in the reverse order."""
    reader = _Reader(data, section.start, section.end)
    count = reader.number()
    if count > section.end - section.start:
        raise ValueError(f"{count} strings do not fit their section")
    lengths = [reader.number() for _ in range(count)]
    return [reader.take(length)[:-1].decode("utf-8", "replace") for length in reversed(lengths)]


def _read_blobs(data: mmap.mmap, listed: Section, section: Section, strings: list[str]) -> Iterator[Blob]:
    reader, place = _Reader(data, listed.start, listed.end), section.start
    if reader.number():
        raise ValueError("it has resources of another program")
    while reader.place < reader.end:
        reader.number()
        for _ in range(reader.number()):
            name, length, kind = reader.number(), reader.number(), reader.byte()
            if kind != BLOB or name >= len(strings):
                raise ValueError(f"resource {name} is no blob")
            entry = _Reader(data, place, min(place + length, section.end))
            alignment, size = entry.number(), entry.number()
            if not 1 <= alignment <= LARGEST_ALIGNMENT:
                raise ValueError(f"'{strings[name]}' has the alignment {alignment}")
            entry.take(-entry.place % alignment)
            if entry.end - entry.place != size:
                raise ValueError(f"'{strings[name]}' has not the bytes that it is said to have")
            yield Blob(strings[name], entry.place, size, alignment)
            place += length


def read_range(path: Path, start: int, size: int) -> Iterator[bytes]:
    """The bytes of a file from a place on, in pieces."""
    with path.open("rb") as file:
        file.seek(start)
        while size and (piece := file.read(min(size, PIECE))):
            size -= len(piece)
            yield piece


def fill_blobs(template: Path, target: Path, sizes: Mapping[str, int], content: Content) -> str:
    """Copy a file with other bytes in the blobs that `sizes` names; return the sha256 of the copy, in hex.

    `content` gives the bytes of such a blob, as many as `sizes` says.
    """
    read = read_bytecode(template)
    data = template.read_bytes()
    heads = list(_write_heads(read.blobs, sizes))
    lengths = [
        len(head) + sizes.get(blob.name, blob.size) for head, blob in zip(heads, read.blobs, strict=True)
    ]
    with target.open("wb") as file:
        out = _Hashed(file)
        out.write(read.head)
        for section in read.sections:
            if section.id == BLOBS:
                most = max((blob.alignment for blob in read.blobs), default=1)
                out.begin(section.id, sum(lengths), most)
                for head, blob in zip(heads, read.blobs, strict=True):
                    out.write(head)
                    kept = [data[blob.start : blob.start + blob.size]]
                    for piece in content(blob.name) if blob.name in sizes else kept:
                        out.write(piece)
            else:
                own = data[section.start : section.end]
                own = _relist(own, lengths) if section.id == BLOB_LIST else own
                out.begin(section.id, len(own), section.alignment)
                out.write(own)
    return out.digest.hexdigest()


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.place = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.place += len(data)

    def begin(self, kind: int, length: int, alignment: int) -> None:
        """Write what comes before a section's bytes; nothing of alignment where they are aligned anyway."""
        said = write_number(length)
        aligned = (self.place + 1 + len(said)) % alignment == 0
        self.write(bytes([kind if aligned else kind | ALIGNED]) + said)
        if not aligned:
            self.write(write_number(alignment))
            self.write(PADDING * (-self.place % alignment))


def _write_heads(blobs: Iterable[Blob], sizes: Mapping[str, int]) -> Iterator[bytes]:
    """What comes before each blob's bytes, its padding with it."""
    place = 0
    for blob in blobs:
        size = sizes.get(blob.name, blob.size)
        head = write_number(blob.alignment) + write_number(size)
        head += PADDING * (-(place + len(head)) % blob.alignment)
        place += len(head) + size
        yield head


def _relist(listed: bytes, lengths: Sequence[int]) -> bytes:
    """The list of blobs with other lengths."""
    reader, own, left = _Reader(listed, 0, len(listed)), io.BytesIO(), iter(lengths)
    own.write(write_number(reader.number()))
    while reader.place < reader.end:
        own.write(write_number(reader.number()))
        count = reader.number()
        own.write(write_number(count))
        for _ in range(count):
            own.write(write_number(reader.number()))
            reader.number()
            own.write(write_number(next(left)) + bytes([reader.byte()]))
    return own.getvalue()
