"""Constants that are written to a package's weight file some rows at a time.

coremltools takes a constant as one array and copies it twice to write it: an embedding of 1 GB takes 3 GB.
A streamed constant is a shape in the program, and its rows are asked for when the file is written. The file
is a MIL blob of version 2 (coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp): a header of 64 bytes
that counts the blobs, then for each one 64 bytes that say its type, its size and where its data begin,
and the data, all of it at multiples of 64.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from anequant.targets.coreml.toolkit import mb, mil_helper

ALIGNMENT = 64
SENTINEL = 0xDEADBEEF
VERSION = 2
FLOAT16 = 1
COUNT = struct.Struct("<II")
METADATA = struct.Struct("<IIQQQ")

Blocks = Callable[[], Iterable[Tensor]]


def stream_constant(shape: tuple[int, ...], blocks: Blocks, name: str) -> Any:
    """Emit a float16 constant of `shape` whose values are those of the float16 `blocks`, one after the other.

    A program either streams all constants of its weight file or none.
    """
    constant = mb.const(val=np.broadcast_to(np.float16(0), shape), name=name)
    constant.op.weight_id = name
    constant.op.row_blocks = blocks
    return constant


@contextmanager
def streaming(scratch: Path, weights: Path) -> Iterator[None]:
    """While a program is saved: its streamed constants go to the weight file that coremltools begins in the
    folder `scratch` and copies to `weights`."""
    before = mil_helper._get_offset_by_writing_data
    streamed: list[bool] = []

    def write(variable: Any, writer: Any) -> int:
        blocks: Blocks | None = getattr(variable.op, "row_blocks", None)
        streamed.append(blocks is not None)
        assert len(set(streamed)) == 1, f"'{variable.name}' is not streamed as the others are"
        if blocks is None:
            offset: int = before(variable, writer)
            return offset
        (file,) = scratch.rglob(weights.name)
        return append_float16(file, blocks())

    mil_helper._get_offset_by_writing_data = write
    try:
        yield
    finally:
        mil_helper._get_offset_by_writing_data = before
    if any(streamed):
        with weights.open("r+b") as target:
            target.write(COUNT.pack(len(streamed), VERSION))


def append_float16(file: Path, blocks: Iterable[Tensor]) -> int:
    """Append a blob to a weight file; return the offset of its metadata. The header is left as it is."""
    with file.open("r+b") as target:
        place = target.seek(-(-target.seek(0, 2) // ALIGNMENT) * ALIGNMENT)
        place = max(place, ALIGNMENT)
        start = place + ALIGNMENT
        target.seek(start)
        size = 0
        for block in blocks:
            size += target.write(block.contiguous().numpy().data)
        target.seek(place)
        target.write(METADATA.pack(SENTINEL, FLOAT16, size, start, 0).ljust(ALIGNMENT, b"\0"))
    return place
