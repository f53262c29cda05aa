"""Safetensors files that lie: each is refused by file and tensor before a tensor is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import Damage, assert_refused, parts, raw

from anequant.errors import InputError

pytestmark = pytest.mark.usefixtures("warm")

NAME = "model.norm.weight"
WEIGHTS = "model.safetensors"


def bytes_of(content: bytes) -> Damage:
    return lambda shard: shard.write_bytes(content)


def length(value: int) -> Damage:
    def damage(shard: Path) -> None:
        content = shard.read_bytes()
        shard.write_bytes(value.to_bytes(8, "little") + content[8:])

    return damage


def text(change: Callable[[bytes], bytes]) -> Damage:
    """Another header text over the same data."""

    def damage(shard: Path) -> None:
        header, data = parts(shard)
        raw(shard, change(json.dumps(header).encode()), data)

    return damage


def entry(**changes: Any) -> Damage:
    def damage(shard: Path) -> None:
        header, data = parts(shard)
        header[NAME] |= changes
        raw(shard, json.dumps(header).encode(), data)

    return damage


def header_of(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(shard: Path) -> None:
        header, data = parts(shard)
        change(header)
        raw(shard, json.dumps(header).encode(), data)

    return damage


def renamed(name: str) -> Damage:
    return header_of(lambda header: header.__setitem__(name, header.pop(NAME)))


def moved(by: int) -> Damage:
    def change(header: dict[str, Any]) -> None:
        header[NAME]["data_offsets"] = [place + by for place in header[NAME]["data_offsets"]]

    return header_of(change)


def many(header: bytes) -> bytes:
    entry = b'"t%d": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    return header[:-1] + b", " + b", ".join(entry % number for number in range(100_001)) + b"}"


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 1)


def appended(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + b"\0")


def directory(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


def fifo(shard: Path) -> None:
    shard.unlink()
    os.mkfifo(shard)


def loop(shard: Path) -> None:
    shard.unlink()
    shard.symlink_to(shard.name)


CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "empty": (bytes_of(b""), ("no complete safetensors file (0 bytes)",)),
    "seven bytes": (bytes_of(b"1234567"), ("no complete safetensors file (7 bytes)",)),
    "lfs pointer": (
        bytes_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        ("git-lfs pointer",),
    ),
    "html": (bytes_of(b"<!DOCTYPE html><html>"), ("an HTML page",)),
    "zip": (bytes_of(b"PK\x03\x04" + bytes(100)), ("a zip archive",)),
    "pickle": (bytes_of(b"\x80\x02}q\x00." + bytes(100)), ("a pickle",)),
    "gguf": (bytes_of(b"GGUF" + bytes(100)), ("a GGUF file",)),
    "length of 2**63": (length(2**63), ("no complete safetensors file",)),
    "length of 2**64 - 1": (length(2**64 - 1), ("no complete safetensors file",)),
    "length beyond the file": (length(10**7), ("no complete safetensors file",)),
    "length of zero": (length(0), ("cannot be read",)),
    "truncated": (cut, ("truncated",)),
    "longer": (appended, ("longer than it says",)),
    "not utf-8": (text(lambda header: b"\xff" + header[1:]), ("cannot be read",)),
    "not json": (text(lambda header: header[:-1]), ("cannot be read",)),
    "a list": (text(lambda header: b"[" + header + b"]"), ("holds no object",)),
    "nested": (text(lambda header: b"[" * 100_000 + b"]" * 100_000), ("cannot be read",)),
    "a key twice": (text(lambda header: header[:-1] + b"," + header[1:]), ("appears twice",)),
    "nan": (text(lambda header: header.replace(b"[0, ", b"[NaN, ", 1)), ("NaN is not JSON",)),
    "metadata of numbers": (header_of(lambda header: header.update(__metadata__={"a": 1})), ("metadata",)),
    "metadata a list": (header_of(lambda header: header.update(__metadata__=[])), ("metadata",)),
    "too many tensors": (text(many), ("announces 1000",)),
    "no dtype": (header_of(lambda header: header[NAME].pop("dtype")), (NAME, "must have a dtype")),
    "no shape": (header_of(lambda header: header[NAME].pop("shape")), (NAME, "must have a dtype, a shape")),
    "no offsets": (header_of(lambda header: header[NAME].pop("data_offsets")), (NAME, "data_offsets")),
    "another key": (entry(extra=1), (NAME, "must have")),
    "entry a number": (header_of(lambda header: header.update({NAME: 3})), (NAME, "must have")),
    "unknown dtype": (entry(dtype="F12"), (NAME, "unknown dtype 'F12'")),
    "dtype a number": (entry(dtype=16), (NAME, "unknown dtype")),
    "an escape as dtype": (entry(dtype="\x1b[2J"), (NAME, r"\x1b[2J")),
    "wider dtype": (entry(dtype="F64"), (NAME, "need another number")),
    "negative shape": (entry(shape=[-64]), (NAME, "impossible shape")),
    "shape of floats": (entry(shape=[64.0]), (NAME, "impossible shape")),
    "shape of bools": (entry(shape=[True]), (NAME, "impossible shape")),
    "shape a word": (entry(shape="64"), (NAME, "impossible shape")),
    "many axes": (entry(shape=[1] * 9), (NAME, "impossible shape")),
    "overflowing shape": (entry(shape=[2**40, 2**40]), (NAME, "need another number")),
    "shape that wraps to the size": (entry(shape=[2**62 + 16, 4]), (NAME, "need another number")),
    "negative offset": (entry(data_offsets=[-1, 255]), (NAME, "impossible data_offsets")),
    "offsets swapped": (entry(data_offsets=[256, 0]), (NAME, "impossible data_offsets")),
    "three offsets": (entry(data_offsets=[0, 256, 512]), (NAME, "impossible data_offsets")),
    "offsets of floats": (entry(data_offsets=[0.0, 256.0]), (NAME, "impossible data_offsets")),
    "overlap": (moved(-256), ("overlap",)),
    "hole": (moved(256), ("hole",)),
    "beyond the end": (moved(2**50), ("hole",)),
    "parent folder as name": (renamed("../../etc/passwd"), ("impossible name", "'../../etc/passwd'")),
    "an escape as name": (renamed("\x1b]0;owned\x07"), ("impossible name", r"\x1b")),
    "a line as name": (renamed("a\nb"), ("impossible name", r"\n")),
    "right to left": (renamed("a\u202eb"), ("impossible name",)),
    "no name": (renamed(""), ("impossible name",)),
    "a name of a megabyte": (renamed("a" * 10**6), ("impossible name", "(1000000 characters)")),
    "another name": (renamed("model.other.weight"), (f"'{NAME}' is missing",)),
    "other shape": (entry(shape=[8, 8]), (NAME, "has shape [8, 8]")),
    "integers": (entry(dtype="I32"), (NAME, "is I32, not a float")),
    "a folder": (directory, ("holds no safetensors weights",)),
    "a fifo": (fifo, ("holds no safetensors weights",)),
    "a link to itself": (loop, ("holds no safetensors weights",)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_lying_file_is_refused(model: Path, case: str) -> None:
    damage, words = CASES[case]
    damage(model / WEIGHTS)
    output = model.parent / "out"
    assert_refused(model.parent, ["quantize", model, "-o", output], InputError.exit_code, *words)
