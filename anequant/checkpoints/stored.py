"""Tensors of safetensors files as they are stored, whatever they are: nothing is checked but the headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from anequant.checkpoints.header import TensorInfo
from anequant.errors import InputError, quote


def read_stored(tensors: Mapping[str, TensorInfo], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of `names`, one in memory at a time, file by file so that each is opened once.

    Unlike `Checkpoint.read` it lets values pass that are not finite. Raises InputError naming file and
    tensor for a dtype that torch does not have, or a file that cannot be read.
    """
    by_shard: dict[Path, list[str]] = {}
    for name in names:
        by_shard.setdefault(tensors[name].shard, []).append(name)
    for shard, wanted in by_shard.items():
        name = wanted[0]
        try:
            with safe_open(shard, framework="pt") as file:
                for name in wanted:
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(f"{quote(name)} cannot be read: {error}", where=str(shard)) from error
