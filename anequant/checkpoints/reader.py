"""Reading a checkpoint: config, index and headers are checked first, tensors are read one at a time.

Nothing is executed and nothing is unpickled; shard names must stay inside the folder (checked on the
name, since a hub cache holds symlinks that point elsewhere).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anequant.architectures import read_spec
from anequant.architectures.spec import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    INPUT_SCALES,
    ModelSpec,
    layer_prefix,
)
from anequant.checkpoints.header import TensorInfo, read_header
from anequant.checkpoints.online_config import INDEX_SUFFIX, SUFFIX, choose_stem, read_online
from anequant.errors import InputError, quote
from anequant.quantization.online import NOTHING, Online
from anequant.strict import parse_json, read_plain

FLOATS = ("F16", "BF16", "F32", "F64")
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
LARGEST_JSON = 16_000_000
_LAYER = re.compile(r"model\.layers\.\d+\.")


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder: `tensors` maps every name to its shard, dtype and shape."""

    folder: Path
    spec: ModelSpec
    tensors: dict[str, TensorInfo]
    online: Online = NOTHING

    @property
    def shards(self) -> list[Path]:
        return sorted({info.shard for info in self.tensors.values()})

    @property
    def files(self) -> list[str]:
        """The names of the files that make it up: its config, the index if it is read, and the weights."""
        names = [shard.name for shard in self.shards]
        first = _first_file(self.folder, choose_stem(self.online))
        return ["config.json", *([] if first in names else [first]), *names]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read one tensor, or some of its rows, as stored. Raises InputError naming file and tensor."""
        info = self.tensors[name]
        try:
            tensor = _bytes_of(info, rows)
        except (OSError, ValueError) as error:
            raise InputError(f"'{name}' cannot be read: {error}", where=str(info.shard)) from error
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):
            count = int((~torch.isfinite(tensor)).sum())
            first = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
            raise InputError(
                f"'{name}' holds {count} values that are not finite, the first at {first}",
                where=str(info.shard),
            )
        return tensor

    @property
    def is_quantized(self) -> bool:
        """Whether this is a per-tensor quantized checkpoint, ours or ANEMLL's."""
        return any(name.endswith(".output_scales") for name in self.tensors)

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Read one layer's float tensors, by name relative to the layer, as stored.

        Where activations are rounded, the input scales that they are rounded with are among them.
        """
        prefix = layer_prefix(layer)
        names = list(self.spec.layer_tensors())
        if self.online.activations:
            scales = [f"{linear.name}.{INPUT_SCALES}" for linear in self.spec.architecture.linears]
            names += [name for name in scales if prefix + name in self.tensors]
        return {name: self.read(prefix + name) for name in names}

    @property
    def head_name(self) -> str:
        """The tensor that serves as the head: the embedding when tied."""
        return f"{EMBEDDING if self.spec.tied else HEAD}.weight"

    def final_gain(self) -> Tensor:
        return self.read(f"{FINAL_NORM}.weight")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a model folder and check it against its architecture's table, reading headers only.

    Raises InputError for missing, damaged or contradictory files (naming file and tensor), and
    UnsupportedError for an architecture or setting that is not known.
    """
    config = read_config(folder)
    where = str(folder / "config.json")
    spec = read_spec(config, where)
    online = read_online(config, spec, where)
    spec, tensors = _tie(spec, _read_headers(folder, choose_stem(online)))
    checkpoint = Checkpoint(folder, spec, tensors, online)
    _check_tensors(checkpoint)
    return checkpoint


def _tie(spec: ModelSpec, tensors: dict[str, TensorInfo]) -> tuple[ModelSpec, dict[str, TensorInfo]]:
    """Apply what config.json's tie_word_embeddings means for these tensors (transformers 5, `tie_weights`).

    A tied model that stores both tables has two; one that stores the head alone embeds with it.
    """
    embedding, head = f"{EMBEDDING}.weight", f"{HEAD}.weight"
    if not spec.tied or head not in tensors:
        return spec, tensors
    if embedding in tensors:
        return replace(spec, tied=False), tensors
    return spec, {embedding if name == head else name: info for name, info in tensors.items()}


def _bytes_of(info: TensorInfo, rows: slice | None) -> Tensor:
    """Return a tensor, or some consecutive rows, in memory of its own: a mapped shard stays as long as any of
    its tensors. Raises OSError, and ValueError for a dtype that is not in torch or a file that ends too
    early."""
    if info.dtype not in DTYPES:
        raise ValueError(f"{info.dtype} is no dtype to compute with")
    shape, start = info.shape, info.start
    if rows is not None:
        first, stop, _ = rows.indices(shape[0])
        shape = (max(stop - first, 0), *shape[1:])
        start += first * math.prod(shape[1:]) * DTYPES[info.dtype].itemsize
    tensor = torch.empty(shape, dtype=DTYPES[info.dtype])
    into = tensor.view(-1).view(torch.uint8).numpy()
    with info.shard.open("rb", buffering=0) as file:
        file.seek(start)
        done = 0
        while done < into.nbytes:
            count = file.readinto(into[done:].data)
            if not count:
                raise ValueError("the file ends too early")
            done += count
    return tensor


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


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"model folder '{folder}' does not exist")
    return read_object(folder / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file as `read_json` does; raises InputError too for JSON that is not an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"'{path.name}' holds no object", where=str(path.parent))
    return value


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises InputError naming it, also for keys that appear twice and NaN."""
    try:
        return parse_json(read_plain(path, LARGEST_JSON))
    except FileNotFoundError as error:
        raise InputError(f"'{path.name}' is missing", where=str(path.parent)) from error
    except (OSError, ValueError) as error:
        raise InputError(f"'{path.name}' cannot be read: {error}", where=str(path.parent)) from error


def _first_file(folder: Path, stem: str) -> str:
    """Return the file that transformers opens first: the weights in one file, and only without them an
    index."""
    single, index_file = f"{stem}{SUFFIX}", f"{stem}{INDEX_SUFFIX}"
    return single if (folder / single).is_file() else index_file


def _read_headers(folder: Path, stem: str) -> dict[str, TensorInfo]:
    single, index_file = f"{stem}{SUFFIX}", f"{stem}{INDEX_SUFFIX}"
    if _first_file(folder, stem) == single:
        return read_header(folder / single)
    if not (folder / index_file).is_file():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".gguf"))
        found = f" (only {', '.join(others)})" if others else ""
        raise InputError(
            f"'{folder}' holds no safetensors weights{found}", remedy=f"provide {single} or {index_file}"
        )
    index = read_json(folder / index_file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"'{index_file}' has no weight_map of names", where=str(folder))
    tensors: dict[str, TensorInfo] = {}
    for shard_name in sorted(set(weight_map.values())):
        shard = read_header(_check_contained(folder, shard_name, index_file))
        for name in sorted(tensors.keys() & shard.keys()):
            both = f"'{tensors[name].shard.name}' and '{shard_name}'"
            raise InputError(f"tensor {quote(name)} is in {both}", where=str(folder))
        tensors.update(shard)
    for name, shard_name in weight_map.items():
        if name not in tensors or tensors[name].shard.name != shard_name:
            raise InputError(f"{quote(name)} is not in '{shard_name}'", where=str(folder / index_file))
    return tensors


def _check_contained(folder: Path, shard_name: str, index_file: str) -> Path:
    where = str(folder / index_file)
    for path in (PurePosixPath(shard_name), PureWindowsPath(shard_name)):
        if len(path.parts) != 1 or path.anchor or shard_name in ("", ".", ".."):
            raise InputError(f"shard {quote(shard_name)} leaves the model folder", where=where)
    if not shard_name.endswith(".safetensors"):
        raise InputError(f"shard {quote(shard_name)} is no safetensors file", where=where)
    if not (folder / shard_name).is_file():
        raise InputError(f"shard {quote(shard_name)} is missing", where=str(folder))
    return folder / shard_name


def _check_tensors(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    for name, shape in spec.tensors().items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise InputError(f"tensor '{name}' is missing", where=str(checkpoint.folder))
        if info.shape != shape:
            raise InputError(
                f"tensor '{name}' has shape {list(info.shape)}, config.json says {list(shape)}",
                where=str(info.shard),
                remedy=f"check {', '.join(spec.keys_of(name))} in config.json",
            )
        if info.dtype not in FLOATS:
            raise InputError(f"tensor '{name}' is {info.dtype}, not a float", where=str(info.shard))
    known = {layer_prefix(layer) for layer in range(spec.num_layers)}
    for extra in checkpoint.tensors:
        prefix = _LAYER.match(extra)
        if prefix is None or prefix[0] in known:
            continue
        raise InputError(
            f"tensor '{extra}' lies beyond the {spec.num_layers} layers of config.json",
            where=str(checkpoint.tensors[extra].shard),
        )
