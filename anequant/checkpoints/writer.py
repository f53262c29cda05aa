"""Writing safetensors in one pass: the header first, from shapes known in advance, then the bytes.

Deterministic: the same tensors in the same order give the same bytes. So a run can resume in the files that
an earlier one left, after the last tensor that is known to be whole.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from anequant.checkpoints.online_config import INDEX_SUFFIX, STEM, SUFFIX
from anequant.errors import UnsupportedError
from anequant.jobs.work_folder import DamagedWork

SHARD_BYTES = 5_000_000_000
DTYPE_NAMES = {torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def write_json(path: Path, value: object) -> None:
    path.write_text(format_json(value), encoding="utf-8")


def format_json(value: object) -> str:
    """Return JSON with sorted keys and a final newline, the same bytes for the same value."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


class CheckpointWriter:
    """Writes the announced entries, in their order, to one or more shards `stem`... of a folder.

    `write` may be called several times for one entry, with consecutive rows.
    """

    def __init__(
        self, folder: Path, entries: Sequence[Entry], stem: str = STEM, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._stem = stem
        self._shards = _split(entries, shard_bytes)
        self._headers = [_header(shard) for shard in self._shards]
        self._pending = [(number, entry) for number, shard in enumerate(self._shards) for entry in shard]
        self._starts = [
            start
            for shard, header in zip(self._shards, self._headers, strict=True)
            for start in _starts(shard, len(header))
        ]
        self._places = {entry.name: place for place, (_, entry) in enumerate(self._pending)}
        self._position = 0
        self._remaining = 0
        self._file: BinaryIO | None = None

    @property
    def first_file(self) -> str:
        """The name of the file that a reader opens first: the only shard, or the index."""
        return self._shard_name(0) if len(self._shards) == 1 else f"{self._stem}{INDEX_SUFFIX}"

    @property
    def position(self) -> int:
        """How many entries are written whole."""
        return self._position

    def resume_at(self, position: int) -> None:
        """Take the first `position` entries from the files that are there; what follows them is overwritten.

        Raises DamagedWork naming a file that is too short for that.
        """
        ends = {
            number: start + entry.nbytes
            for (number, entry), start in zip(self._pending[:position], self._starts, strict=False)
        }
        for number, end in ends.items():
            path = self._folder / self._shard_name(number)
            if not path.is_file() or path.stat().st_size < end:
                raise DamagedWork(f"'{path.name}' of an interrupted run is cut off", self._folder)
        self._position = position

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return an entry that is written whole, or some of its rows."""
        self.flush()
        place = self._places[name]
        assert place < self._position, f"{name} is not written yet"
        number, entry = self._pending[place]
        start, stop, _ = (rows or slice(None)).indices(entry.shape[0])
        size = entry.nbytes // entry.shape[0]
        with (self._folder / self._shard_name(number)).open("rb") as file:
            file.seek(self._starts[place] + start * size)
            data = bytearray(file.read((stop - start) * size))
        return torch.frombuffer(data, dtype=entry.dtype).view(stop - start, *entry.shape[1:])

    def flush(self) -> None:
        """Hand all bytes to the system."""
        if self._file is not None:
            self._file.flush()

    def write(self, name: str, tensor: Tensor) -> None:
        if self._remaining == 0:
            self._begin(name)
        number, entry = self._pending[self._position]
        data = tensor.detach().contiguous()
        assert name == entry.name and data.dtype == entry.dtype, f"{name} written where {entry.name} is due"
        assert self._file is not None and data.nbytes <= self._remaining
        self._file.write(data.view(-1).view(torch.uint8).numpy().data)
        self._remaining -= data.nbytes
        if self._remaining == 0:
            self._position += 1
            if self._position == len(self._pending) or self._pending[self._position][0] != number:
                self._file.close()
                self._file = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            assert self._position == len(self._pending), "not every announced tensor was written"
            if len(self._shards) > 1:
                write_json(self._folder / self.first_file, self._index())

    def _begin(self, name: str) -> None:
        number, entry = self._pending[self._position]
        self._remaining = entry.nbytes
        if self._file is not None:
            return
        path = self._folder / self._shard_name(number)
        if entry is self._shards[number][0]:
            self._file = path.open("wb")
            self._file.write(self._headers[number])
        else:
            self._file = path.open("r+b")
            self._file.truncate(self._starts[self._position])
            self._file.seek(0, os.SEEK_END)

    def _shard_name(self, number: int) -> str:
        count = len(self._shards)
        part = "" if count == 1 else f"-{number + 1:05d}-of-{count:05d}"
        return f"{self._stem}{part}{SUFFIX}"

    def _index(self) -> Mapping[str, object]:
        return {
            "metadata": {"total_size": sum(entry.nbytes for _, entry in self._pending)},
            "weight_map": {entry.name: self._shard_name(number) for number, entry in self._pending},
        }


def _split(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _starts(entries: Sequence[Entry], first: int) -> list[int]:
    """Return where each entry begins, the first one at `first`."""
    return list(itertools.accumulate((entry.nbytes for entry in entries[:-1]), initial=first))


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        if offset % entry.dtype.itemsize:
            raise UnsupportedError(f"'{entry.name}' follows tensors of odd width and would be misaligned")
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
