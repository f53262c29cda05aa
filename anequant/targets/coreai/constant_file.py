"""The constants of an asset, made of a checkpoint one linear or some rows at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.checkpoints.layers import load_layer, load_table
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import UnsupportedError
from anequant.jobs.control import Progress
from anequant.quantization.linear import FloatTable, QuantizedLinear
from anequant.targets.coreai.design import CODES, COS, SIN, Constant
from anequant.targets.shared.headroom import Headroom, fit_layer, fit_table
from anequant.targets.shared.packed_codes import take_rows
from anequant.targets.shared.rope_tables import compute_rope_tables
from anequant.targets.shared.rotation_names import name_factor
from anequant.targets.shared.rotation_weights import make_online_weights

Array = np.ndarray[Any, Any]
LARGEST_PART = 16384
"""Rows of the head that one convolution may have: the longest axis of the Neural Engine."""


@dataclass(frozen=True)
class Stored:
    """A constant, and where its bytes begin in the file of all of them, or who reads them some at a time."""

    constant: Constant
    start: int = 0
    pieces: Callable[[], Iterable[Array]] | None = None


@dataclass
class ConstantFile:
    """Constants that are written to a file one after the other, and read back by name; tables in float stay
    where they are until then.

    dtype   of all that is no code: float16 or float32
    stored  what was written, by name
    """

    path: Path
    dtype: str = "float16"
    stored: dict[str, Stored] = field(default_factory=dict)
    _end: int = 0

    def add(self, name: str, constant: Constant, pieces: Iterable[Array]) -> None:
        """Append a constant, given in pieces, whose bytes are as many as it has."""
        with self.path.open("ab") as file:
            written = sum(_write(file, piece) for piece in pieces)
        assert written == constant.nbytes, f"{name}: {written} bytes of {constant.nbytes}"
        self.stored[name] = Stored(constant, self._end)
        self._end += written

    def add_tensor(self, name: str, values: Tensor, *shape: int) -> None:
        """Append float numbers, in a shape."""
        array = values.to(getattr(torch, self.dtype)).contiguous().numpy()
        self.add(name, Constant(self.dtype, tuple(shape)), [array])

    def refer(self, name: str, constant: Constant, pieces: Callable[[], Iterable[Array]]) -> None:
        """Keep a constant where it is: `pieces` reads it."""
        self.stored[name] = Stored(constant, pieces=pieces)

    def read(self, name: str, most: int = 1 << 24) -> Iterator[bytes | memoryview]:
        """The bytes of a constant, in pieces, of at most so many where they lie in the file."""
        stored = self.stored[name]
        if stored.pieces is not None:
            for values in stored.pieces():
                yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
            return
        left = stored.constant.nbytes
        with self.path.open("rb") as file:
            file.seek(stored.start)
            while left:
                piece = file.read(min(left, most))
                left -= len(piece)
                yield piece


def write_constants(
    checkpoint: Checkpoint, headroom: Headroom, context: int, file: ConstantFile, progress: Progress
) -> None:
    """Write every constant of the asset of a checkpoint, with one layer of it in memory.

    Raises UnsupportedError for weights with scales of groups, and as `compute_rope_tables` and `fit_layer`.
    """
    spec = checkpoint.spec
    for name, values in zip((COS, SIN), compute_rope_tables(spec, context), strict=True):
        file.add_tensor(name, values, *values.shape)
    for name, factors in make_online_weights(spec, checkpoint.online).items():
        for number, factor in enumerate(factors):
            _add_factor(file, name_factor(name, number), factor)
    _add_embedding(file, fit_table(load_table(checkpoint, EMBEDDING), headroom))
    for index in range(spec.num_layers):
        progress(f"layer {index}", (index + 1) / (spec.num_layers + 1))
        layer = fit_layer(spec, load_layer(checkpoint, index), headroom)
        for name, linear in layer.linears.items():
            _add_linear(file, layer_prefix(index) + name, linear)
        for name, gain in layer.gains.items():
            _add_gain(file, f"{layer_prefix(index)}{name}.weight", gain, heads=name not in spec.norms)
    _add_gain(file, f"{FINAL_NORM}.weight", checkpoint.read(f"{FINAL_NORM}.weight"), heads=False)
    _add_head(file, load_table(checkpoint, HEAD))


def split_rows(rows: int) -> list[slice]:
    """The fewest slices of at most LARGEST_PART rows; the first ones are longer by one where need be."""
    parts = math.ceil(rows / LARGEST_PART)
    small, longer = divmod(rows, parts)
    ends = [small * part + min(part, longer) for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def pack_codes(codes: Array, bits: int) -> Array:
    """Pack codes [n] into bytes, each code's lowest bit first, without gaps: 8 of 3 bits take 3 bytes."""
    if bits == 8:
        return codes
    together = 8 // math.gcd(8, bits)
    padded = np.zeros(-(-len(codes) // together) * together, np.uint8)
    padded[: len(codes)] = codes
    groups = padded.reshape(-1, together)
    words = groups[:, 0].astype(np.uint8 if together * bits == 8 else "<u4")
    for place in range(1, together):
        words |= groups[:, place].astype(words.dtype) << words.dtype.type(bits * place)
    packed = words.view(np.uint8).reshape(len(words), -1)[:, : together * bits // 8]
    return np.ascontiguousarray(packed).reshape(-1)[: -(-len(codes) * bits // 8)]


def unpack_codes(packed: Array, bits: int, count: int) -> Array:
    """The codes [count] that `pack_codes` packed."""
    if bits == 8:
        return packed[:count]
    spread = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(spread, axis=1, bitorder="little").reshape(-1)


def _write(file: BinaryIO, piece: Array) -> int:
    return file.write(np.ascontiguousarray(piece).data)


def _add_linear(file: ConstantFile, name: str, linear: QuantizedLinear) -> None:
    rows, columns = linear.codes.shape
    if linear.output_scale.ndim == 2:
        raise UnsupportedError(
            f"'{name}' has scales of groups, which Core AI's tables have wrong on the engine",
            remedy="quantize with scales = 'balanced' or 'output', or lower with --target coreml",
        )
    _add_codes(file, name, linear, (rows, columns, 1, 1))
    file.add_tensor(f"{name}.output_scale", linear.output_scale, 1, rows, 1, 1)
    if bool((linear.input_scale != 1).any()):
        file.add_tensor(f"{name}.input_scale", linear.input_scale, 1, columns, 1, 1)
    if linear.bias is not None:
        file.add_tensor(f"{name}.bias", linear.bias, 1, rows, 1, 1)


def _add_codes(file: ConstantFile, name: str, linear: QuantizedLinear, shape: tuple[int, ...]) -> None:
    packed = pack_codes(linear.codes.numpy().reshape(-1), linear.bits)
    file.add(f"{name}.codes", Constant(CODES[linear.bits], shape), [packed])
    entries = linear.codebook.numel()
    file.add_tensor(f"{name}.codebook", linear.codebook, *[1] * len(shape), entries, 1)


def _add_factor(file: ConstantFile, name: str, factor: Tensor) -> None:
    """A factor of a Hadamard matrix, which is one number and its negative, in codes of one bit."""
    size = factor.abs().max()
    assert bool((factor.abs() == size).all()), name
    codes = pack_codes((factor > 0).to(torch.uint8).numpy().reshape(-1), 1)
    file.add(f"{name}.codes", Constant(CODES[1], tuple(factor.shape)), [codes])
    file.add_tensor(f"{name}.codebook", torch.stack([-size, size]), 1, 1, 1, 1, 2, 1)


def _add_gain(file: ConstantFile, name: str, gain: Tensor, *, heads: bool) -> None:
    """A norm's gain, unless it is all ones; over heads it lies along the third axis."""
    if bool((gain != 1).any()):
        file.add_tensor(name, gain, *((1, 1, len(gain), 1) if heads else (1, len(gain), 1, 1)))


def _add_embedding(file: ConstantFile, table: QuantizedLinear | FloatTable) -> None:
    if isinstance(table, FloatTable):
        _add_float(file, f"{EMBEDDING}.weight", table, lambda rows, columns: (rows, 1, columns))
        return
    rows, columns = table.codes.shape
    _add_codes(file, EMBEDDING, table, (rows, 1, columns))
    file.add_tensor(f"{EMBEDDING}.output_scale", table.output_scale, rows, 1, 1)


def _add_head(file: ConstantFile, head: QuantizedLinear | FloatTable) -> None:
    rows = len(head.rows) if isinstance(head, FloatTable) else len(head.codes)
    for number, part in enumerate(split_rows(rows), 1):
        name = f"{HEAD}.{number}"
        if isinstance(head, FloatTable):
            _add_float(file, f"{name}.weight", head.part(part), lambda rows, columns: (rows, columns, 1, 1))
        else:
            _add_linear(file, name, take_rows(head, part))


def _add_float(file: ConstantFile, name: str, table: FloatTable, shape: Any) -> None:
    dtype = getattr(torch, file.dtype)
    constant = Constant(file.dtype, shape(*table.shape))
    file.refer(name, constant, lambda: (block.to(dtype).numpy() for block in table.blocks()))
