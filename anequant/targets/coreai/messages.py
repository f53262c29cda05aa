"""What the process that runs an asset is told and answers: JSON, and the arrays that it names after it.

A message is its length in 4 bytes, JSON, and the bytes of every array that `arrays` of it lists, in order.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

Array = np.ndarray[Any, Any]
LENGTH = struct.Struct("<I")


def send(stream: IO[bytes], content: Mapping[str, Any], arrays: Mapping[str, Array] | None = None) -> None:
    """Write a message; raises OSError where nobody reads it."""
    arrays = arrays or {}
    listed = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    text = json.dumps({**content, "arrays": listed}).encode()
    stream.write(LENGTH.pack(len(text)) + text)
    for array in arrays.values():
        stream.write(np.ascontiguousarray(array).tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read a message; raises EOFError where the other side has gone."""
    content = json.loads(_take(stream, LENGTH.unpack(_take(stream, LENGTH.size))[0]))
    arrays = {}
    for name, dtype, shape in content.pop("arrays"):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(_take(stream, size), dtype).reshape(shape)
    return content, arrays


def _take(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data
