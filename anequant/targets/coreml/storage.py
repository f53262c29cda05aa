"""Reads a saved .mlpackage: its manifest, its model protobuf, its weight file.

Nothing here knows what an operation means. A constant becomes a torch tensor, a string, or (built by the
operators from two tensors) a `Palettized`: codes into a codebook, made dense only where that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anequant.errors import InputError, UnsupportedError
from anequant.strict import parse_json, read_plain
from anequant.targets.coreml.toolkit import BlobReader, MIL_pb2, Model_pb2


@dataclass(frozen=True)
class DataType:
    """A MIL element type: its name, how torch holds it, its width and how the weight file calls it."""

    name: str
    torch: torch.dtype
    bits: int
    blob: str = ""
    signed: bool = True


_TYPES = {
    "BOOL": DataType("bool", torch.bool, 8),
    "FLOAT16": DataType("fp16", torch.float16, 16, "fp16"),
    "FLOAT32": DataType("fp32", torch.float32, 32, "float"),
    "INT4": DataType("int4", torch.int8, 4, "int4"),
    "INT8": DataType("int8", torch.int8, 8, "int8"),
    "INT16": DataType("int16", torch.int16, 16, "int16"),
    "INT32": DataType("int32", torch.int32, 32, "int32"),
    "INT64": DataType("int64", torch.int64, 64),
    **{f"UINT{n}": DataType(f"uint{n}", torch.uint8, n, f"uint{n}", False) for n in (1, 2, 3, 4, 6, 8)},
    "UINT16": DataType("uint16", torch.uint16, 16, "uint16", False),
    "UINT32": DataType("uint32", torch.uint32, 32, "uint32", False),
}
STRING = MIL_pb2.DataType.Value("STRING")
DATA_TYPES: dict[int, DataType] = {MIL_pb2.DataType.Value(name): dtype for name, dtype in _TYPES.items()}
TORCH_TYPES: dict[str, torch.dtype] = {dtype.name: dtype.torch for dtype in _TYPES.values()}

_CODES_AT_ONCE = 1 << 18
LARGEST_MANIFEST = 1_000_000


@dataclass(frozen=True)
class Palettized:
    """A constant stored as codes.

    codes     uint8, any shape
    codebook  shape (g0, .., gn, entries, width): one list of entries for each block of codes, where the
              number of blocks along each axis divides the codes' size along it
    axis      where an entry of `width` > 1 numbers extends the codes
    """

    codes: Tensor
    codebook: Tensor
    axis: int = 0

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values, in the codebook's type or in `dtype`."""
        *groups, entries, width = self.codebook.shape
        trailing = (width,) if width > 1 else ()
        table = self.codebook.reshape(-1, *trailing).to(dtype or self.codebook.dtype)
        shape = self.codes.shape
        offsets = []
        for axis, (count, size) in enumerate(zip(groups, shape, strict=True)):
            if count > 1:
                block = torch.arange(size, dtype=torch.int32) // (size // count)
                step = math.prod(groups[axis + 1 :]) * entries
                offsets.append((axis, (block * step).reshape(-1, *[1] * (len(shape) - axis - 1))))
        values = torch.empty(*shape, *trailing, dtype=table.dtype)
        rows = max(_CODES_AT_ONCE // max(math.prod(shape[1:]), 1), 1)
        buffer = torch.empty(min(rows, shape[0]), *shape[1:], dtype=torch.int32)
        for start in range(0, shape[0], rows):
            part = slice(start, start + rows)
            index = buffer[: len(self.codes[part])].copy_(self.codes[part])
            for axis, offset in offsets:
                index += offset[part] if axis == 0 else offset
            torch.index_select(table, 0, index.flatten(), out=values[part].view(-1, *trailing))
        axis = self.axis % len(shape)
        return values.movedim(-1, axis + 1).flatten(axis, axis + 1) if trailing else values

    def rows(self, index: Tensor) -> Palettized:
        """Return the rows `index` (int64, one axis) of axis 0, still as codes."""
        codebook = self.codebook
        if codebook.shape[0] > 1:
            codebook = codebook.index_select(0, index // (self.codes.shape[0] // codebook.shape[0]))
        return Palettized(self.codes.index_select(0, index), codebook, self.axis)


Value = Tensor | Palettized | str


class Weights:
    """Decodes the constants of a model: immediate values, and values in the files beside it.

    `folder` is what the model calls @model_path: the folder of the model file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._readers: dict[str, Any] = {}

    def read(self, value: Any) -> Tensor | str:
        """Read a MIL_pb2.Value as a tensor of its declared shape, or a string; InputError if damaged."""
        if value.type.WhichOneof("type") != "tensorType":
            raise UnsupportedError("a constant that is neither a tensor nor a string")
        dims = value.type.tensorType.dimensions
        shape = tuple(dim.constant.size for dim in dims)
        if value.type.tensorType.dataType == STRING:
            return str(value.immediateValue.tensor.strings.values[0])
        dtype = read_data_type(value.type.tensorType)
        if value.WhichOneof("value") == "blobFileValue":
            flat = self._blob(value.blobFileValue, dtype)
        else:
            flat = _immediate(value, dtype)
        if flat.size < math.prod(shape):
            raise InputError(f"a constant of shape {shape} has {flat.size} values", where=str(self._folder))
        flat = np.require(flat[: math.prod(shape)], requirements="W")
        return torch.from_numpy(flat).view(dtype.torch).reshape(shape)

    def _blob(self, blob: Any, dtype: DataType) -> np.ndarray[Any, Any]:
        name = blob.fileName.removeprefix("@model_path/")
        path = resolve_below(self._folder, name)
        try:
            if name not in self._readers:
                if not path.is_file():
                    raise ValueError("there is no such file")
                self._readers[name] = BlobReader(str(path))
            read = getattr(self._readers[name], f"read_{dtype.blob}_data")
            flat: np.ndarray[Any, Any] = read(blob.offset)
        except (AttributeError, IndexError, RuntimeError, ValueError, MemoryError) as error:
            problem = f"cannot read a {dtype.name} constant at offset {blob.offset}: {error}"
            raise InputError(problem, where=str(path), remedy="write the package again") from error
        return flat


def _immediate(value: Any, dtype: DataType) -> np.ndarray[Any, Any]:
    tensor = value.immediateValue.tensor
    field = tensor.WhichOneof("value")
    numpy_type = torch.empty(0, dtype=dtype.torch).numpy().dtype
    if field is None:
        return np.empty(0, numpy_type)
    values = getattr(tensor, field).values
    if field != "bytes":
        return np.array(values, numpy_type)
    if dtype.bits >= 8:
        return np.frombuffer(values, numpy_type)
    bits = np.unpackbits(np.frombuffer(values, np.uint8), bitorder="little")
    rows = bits[: bits.size // dtype.bits * dtype.bits].reshape(-1, dtype.bits)
    codes = rows @ (1 << np.arange(dtype.bits))
    if dtype.signed:
        codes = codes - (codes >> (dtype.bits - 1) << dtype.bits)
    return codes.astype(numpy_type)


def read_data_type(tensor_type: Any) -> DataType:
    """Read the element type of a MIL_pb2.TensorType; UnsupportedError for one that nothing here can hold."""
    if tensor_type.dataType not in DATA_TYPES:
        raise UnsupportedError(f"element type {MIL_pb2.DataType.Name(tensor_type.dataType)}")
    return DATA_TYPES[tensor_type.dataType]


def resolve_below(folder: Path, name: str) -> Path:
    """Return `folder / name`; InputError for a name that is not a plain relative path below it."""
    parts = PurePosixPath(name).parts
    if not parts or "\\" in name or ":" in name or "\0" in name or name.startswith("/") or ".." in parts:
        raise InputError(f"the path '{name}' leaves the package", where=str(folder))
    return folder.joinpath(*parts)


@contextmanager
def damage(where: str) -> Iterator[None]:
    """Raise InputError for whatever a well-formed protobuf can say that makes no program: a missing part, a
    name that nothing has, sizes that do not agree."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise InputError(f"the package is damaged ({reason})", where=where) from error


def find_model_file(package: Path) -> Path:
    """Find the root model of an .mlpackage by its Manifest.json; InputError if it says nothing usable."""
    manifest = package / "Manifest.json"
    remedy = "point to an .mlpackage folder"
    try:
        content = parse_json(read_plain(manifest, LARGEST_MANIFEST))
        name = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
    except OSError as error:
        raise InputError("not a Core ML package", where=str(manifest), remedy=remedy) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("the manifest does not name a root model", where=str(manifest)) from error
    if not isinstance(name, str):
        raise InputError("the manifest does not name a root model", where=str(manifest))
    path = resolve_below(package / "Data", name)
    if not path.is_file():
        raise InputError("the manifest's model file is missing", where=str(path))
    return path


def read_model(path: Path) -> Any:
    """Read the Model_pb2.Model in a model file; it must be an mlProgram (UnsupportedError otherwise)."""
    model = Model_pb2.Model()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:
        raise InputError("the model file is damaged", where=str(path)) from error
    if model.WhichOneof("Type") != "mlProgram":
        raise UnsupportedError(f"a model of type {model.WhichOneof('Type')}, not mlProgram", where=str(path))
    return model
