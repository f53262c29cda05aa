"""The header of a safetensors file, checked before anything else sees the file.

8 bytes give the length of a JSON object that maps each tensor's name to its dtype, its shape and where its
bytes lie behind the header; the tensors must fill the rest of the file without holes or overlaps
(safetensors' own README, "Format"). All sums are Python integers, so none wraps around.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.errors import InputError, quote
from anequant.strict import parse_json

LARGEST_HEADER = 16_000_000
MOST_TENSORS = 100_000
LONGEST_NAME = 512
MOST_AXES = 8
BITS = {
    "BOOL": 8,
    **{f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)},
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}
IMPOSTORS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file it points to",
    b"<!DOCTYPE": "an HTML page",
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"PK\x03\x04": "a zip archive, perhaps of pickles",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"GGUF": "a GGUF file",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a shard; its bytes begin at byte `start` of the file."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(shard: Path) -> dict[str, TensorInfo]:
    """Return the tensors a safetensors file announces, checked against each other and the file's size.

    Raises InputError naming the file, and the tensor where one is to blame.
    """
    where = str(shard)
    try:
        status = shard.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"'{shard.name}' is not a regular file", where=where)
        header, start = _parse(shard, status.st_size)
    except (OSError, ValueError) as error:
        raise InputError(f"'{shard.name}' cannot be read: {error}", where=where) from error
    if not isinstance(header, dict):
        raise InputError(f"the header of '{shard.name}' holds no object", where=where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"'{shard.name}' has metadata that are not words", where=where)
    _require_few(len(header), shard)
    spans = []
    for name, entry in header.items():
        problem = _problem(name, entry)
        if problem:
            raise InputError(f"tensor {quote(name)} of '{shard.name}' {problem}", where=where)
        spans.append((*entry["data_offsets"], name))
    for problem in _gaps(sorted(spans), status.st_size - start):
        raise InputError(f"'{shard.name}' {problem}", where=where, remedy="download it again")
    return {
        name: TensorInfo(shard, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _parse(shard: Path, size: int) -> tuple[Any, int]:
    """Return the header's JSON and where the tensors begin."""
    with shard.open("rb") as file:
        beginning = file.read(32)
        for magic, what in IMPOSTORS.items():
            if beginning.startswith(magic) and beginning[8:9] != b"{":
                raise InputError(
                    f"'{shard.name}' is {what}", where=str(shard), remedy="download the file itself"
                )
        length = int.from_bytes(beginning[:8], "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise InputError(
                f"'{shard.name}' is no complete safetensors file ({size} bytes)",
                where=str(shard),
                remedy="download it again",
            )
        file.seek(8)
        text = file.read(length)
        _require_few(text.count(b'"data_offsets"'), shard)
        return parse_json(text), 8 + length


def _require_few(count: int, shard: Path) -> None:
    if count > MOST_TENSORS:
        raise InputError(f"'{shard.name}' announces {count} tensors", where=str(shard))


def _problem(name: str, entry: Any) -> str | None:
    """Return what is wrong with one tensor's entry by itself, None where nothing is."""
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable() or ".." in name.split("/"):
        return "has an impossible name"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "must have a dtype, a shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"is of the unknown dtype {quote(str(dtype))}"
    if not _counts(shape) or len(shape) > MOST_AXES:
        return "has an impossible shape"
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "has impossible data_offsets"
    if math.prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        return f"has {offsets[1] - offsets[0]} bytes, its shape {shape} and {dtype} need another number"
    return None


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _gaps(spans: list[tuple[int, int, str]], size: int) -> Iterator[str]:
    """Yield where the tensors do not fill the file; spans are (begin, end, name), sorted."""
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            yield f"has {'a hole before' if begin > end else 'an overlap at'} {quote(name)}"
        end = stop
    if end != size:
        yield f"is {'truncated' if size < end else 'longer than it says'}: {size} bytes of tensors, not {end}"
