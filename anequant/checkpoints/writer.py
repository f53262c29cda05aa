"""Writing safetensors in one pass: the header first, from shapes known in advance, then the bytes.

Deterministic: the same tensors in the same order give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from anequant.checkpoints.online import INDEX_SUFFIX, STEM, SUFFIX
from anequant.errors import UnsupportedError

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
    """JSON with sorted keys and a final newline, the same bytes for the same value."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


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
        self._pending = [(number, entry) for number, shard in enumerate(self._shards) for entry in shard]
        self._position = 0
        self._remaining = 0
        self._file: BinaryIO | None = None

    @property
    def first_file(self) -> str:
        """The name of the file that a reader opens first: the only shard, or the index."""
        return self._shard_name(0) if len(self._shards) == 1 else f"{self._stem}{INDEX_SUFFIX}"

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
        if self._file is None:
            self._file = (self._folder / self._shard_name(number)).open("wb")
            self._file.write(_header(self._shards[number]))

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
