"""What files of tensors hold, from their headers: names, counts, dtypes, shapes and bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from anequant.checkpoints.header import BITS, TensorInfo

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class TensorKind:
    """Tensors that differ in the numbers of their names only, which `name` has as *."""

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class TensorFiles:
    """Files of tensors; `dtypes` are bytes by dtype, `float16_bytes` what as many values take in float16."""

    tensors: int
    values: int
    kinds: tuple[TensorKind, ...]
    dtypes: Mapping[str, int]
    files: Mapping[str, int]
    float16_bytes: int


def tensor_files(tensors: Mapping[str, TensorInfo]) -> TensorFiles:
    """`tensors` as `read_header` and `open_checkpoint` give them; only sizes of files are looked up."""
    found: dict[tuple[str, str, tuple[int, ...]], int] = {}
    dtypes: dict[str, int] = {}
    for name, info in tensors.items():
        key = (name_pattern(name), info.dtype, info.shape)
        found[key] = found.get(key, 0) + 1
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + stored_bytes(info)
    kinds = tuple(
        TensorKind(name, count, dtype, shape, count * math.prod(shape) * BITS[dtype] // 8)
        for (name, dtype, shape), count in found.items()
    )
    values = sum(math.prod(info.shape) for info in tensors.values())
    shards = sorted({info.shard for info in tensors.values()})
    sizes = {shard.name: shard.stat().st_size for shard in shards}
    return TensorFiles(len(tensors), values, kinds, dtypes, sizes, 2 * values)


def name_pattern(name: str) -> str:
    """A name with * for every part that is a number."""
    return _NUMBER.sub("*", name)


def stored_bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * BITS[info.dtype] // 8
