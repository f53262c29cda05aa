"""The constants of an asset, made of a checkpoint one linear or some rows at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.checkpoints.layers import load_layer, load_table
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import UnsupportedError
from anequant.jobs.control import Progress
from anequant.quantization.linear import FloatTable, QuantizedLinear
from anequant.targets.coreai.bytecode import read_range
from anequant.targets.coreai.design import (
    BIAS,
    CODEBOOK,
    CODES,
    COS,
    INPUT_SCALE,
    OUTPUT_SCALE,
    PLAIN,
    SIN,
    WIDTHS,
    Constant,
    name_head_part,
)
from anequant.targets.shared.headroom import Headroom, fit_layer, fit_table
from anequant.targets.shared.packed_codes import take_rows
from anequant.targets.shared.rope_tables import compute_rope_tables
from anequant.targets.shared.rotation_names import name_factor
from anequant.targets.shared.rotation_weights import make_online_weights

Array = np.ndarray[Any, Any]
LARGEST_PART = 16384
"""Rows of the head that one convolution may have: the longest axis of the Neural Engine."""


@dataclass(frozen=True)
class Filled:
    """A constant, and who gives its numbers, in pieces; those of a `table` in float are read only then."""

    name: str
    constant: Constant
    pieces: Callable[[], Iterable[Array]]
    table: bool = False

    def content(self) -> Iterator[memoryview]:
        for values in self.pieces():
            yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


@dataclass
class ConstantFile:
    """Constants that are written to a file one after the other, and read back by name; tables in float stay
    where they are until then."""

    path: Path
    constants: dict[str, Constant] = field(default_factory=dict)
    _places: dict[str, int] = field(default_factory=dict)
    _tables: dict[str, Filled] = field(default_factory=dict)
    _end: int = 0

    def add(self, filled: Filled) -> None:
        """Append a constant, or keep in mind who gives it."""
        self.constants[filled.name] = filled.constant
        if filled.table:
            self._tables[filled.name] = filled
            return
        with self.path.open("ab") as file:
            written = sum(file.write(piece) for piece in filled.content())
        assert written == filled.constant.nbytes, f"{filled.name}: {written} of {filled.constant.nbytes}"
        self._places[filled.name] = self._end
        self._end += written

    def read(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of a constant, in pieces."""
        if name in self._tables:
            return self._tables[name].content()
        return read_range(self.path, self._places[name], self.constants[name].nbytes)


def list_constants(
    checkpoint: Checkpoint, headroom: Headroom, context: int, dtype: str, progress: Progress
) -> Iterator[Filled]:
    """Yield every constant of the asset of a checkpoint, with one layer of it in memory.

    `dtype` is of all that is no code: float16 or float32. Raises UnsupportedError for weights with scales of
    groups, and as `compute_rope_tables` and `fit_layer`.
    """
    spec = checkpoint.spec
    for name, values in zip((COS, SIN), compute_rope_tables(spec, context), strict=True):
        yield _floats(name, values, dtype, *values.shape)
    for name, factors in make_online_weights(spec, checkpoint.online).items():
        for number, factor in enumerate(factors):
            yield from _list_factor(name_factor(name, number), factor, dtype)
    yield from _list_embedding(fit_table(load_table(checkpoint, EMBEDDING), headroom), dtype)
    for index in range(spec.num_layers):
        progress(f"layer {index}", index / spec.num_layers)
        layer = fit_layer(spec, load_layer(checkpoint, index), headroom)
        for name, linear in layer.linears.items():
            yield from _list_linear(layer_prefix(index) + name, linear, dtype)
        for name, gain in layer.gains.items():
            heads = name not in spec.norms
            yield from _list_gain(f"{layer_prefix(index)}{name}{PLAIN}", gain, dtype, heads=heads)
    gain = checkpoint.read(f"{FINAL_NORM}.weight")
    yield from _list_gain(f"{FINAL_NORM}{PLAIN}", gain, dtype, heads=False)
    yield from _list_head(load_table(checkpoint, HEAD), dtype)


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


def _floats(name: str, values: Tensor, dtype: str, *shape: int) -> Filled:
    array = values.to(getattr(torch, dtype)).contiguous().numpy()
    return Filled(name, Constant(dtype, tuple(shape)), lambda: [array])


def _codes(name: str, codes: Tensor, bits: int, *shape: int) -> Filled:
    packed = pack_codes(codes.numpy().reshape(-1), bits)
    return Filled(name + CODES, Constant(WIDTHS[bits], tuple(shape)), lambda: [packed])


def _list_linear(name: str, linear: QuantizedLinear, dtype: str) -> Iterator[Filled]:
    rows, columns = linear.codes.shape
    if linear.output_scale.ndim == 2:
        raise UnsupportedError(
            f"'{name}' has scales of groups, which Core AI's tables have wrong on the engine",
            remedy="quantize with scales = 'balanced' or 'output', or lower with --target coreml",
        )
    yield _codes(name, linear.codes, linear.bits, rows, columns, 1, 1)
    yield _floats(name + CODEBOOK, linear.codebook, dtype, 1, 1, 1, 1, linear.codebook.numel(), 1)
    yield _floats(name + OUTPUT_SCALE, linear.output_scale, dtype, 1, rows, 1, 1)
    if bool((linear.input_scale != 1).any()):
        yield _floats(name + INPUT_SCALE, linear.input_scale, dtype, 1, columns, 1, 1)
    if linear.bias is not None:
        yield _floats(name + BIAS, linear.bias, dtype, 1, rows, 1, 1)


def _list_factor(name: str, factor: Tensor, dtype: str) -> Iterator[Filled]:
    """A factor of a Hadamard matrix, which is one number and its negative, in codes of one bit."""
    size = factor.abs().max()
    assert bool((factor.abs() == size).all()), name
    yield _codes(name, (factor > 0).to(torch.uint8), 1, *factor.shape)
    yield _floats(name + CODEBOOK, torch.stack([-size, size]), dtype, 1, 1, 1, 1, 2, 1)


def _list_gain(name: str, gain: Tensor, dtype: str, *, heads: bool) -> Iterator[Filled]:
    """A norm's gain, unless it is all ones; over heads it lies along the third axis."""
    if bool((gain != 1).any()):
        yield _floats(name, gain, dtype, *((1, 1, len(gain), 1) if heads else (1, len(gain), 1, 1)))


def _list_embedding(table: QuantizedLinear | FloatTable, dtype: str) -> Iterator[Filled]:
    if isinstance(table, FloatTable):
        rows, columns = table.shape
        yield _table(EMBEDDING, table, dtype, rows, 1, columns)
        return
    rows, columns = table.codes.shape
    yield _codes(EMBEDDING, table.codes, table.bits, rows, 1, columns)
    yield _floats(EMBEDDING + CODEBOOK, table.codebook, dtype, 1, 1, 1, table.codebook.numel(), 1)
    yield _floats(EMBEDDING + OUTPUT_SCALE, table.output_scale, dtype, rows, 1, 1)


def _list_head(head: QuantizedLinear | FloatTable, dtype: str) -> Iterator[Filled]:
    rows = head.shape[0] if isinstance(head, FloatTable) else len(head.codes)
    for number, part in enumerate(split_rows(rows), 1):
        name = name_head_part(number)
        if isinstance(head, FloatTable):
            piece = head.part(part)
            yield _table(name, piece, dtype, *piece.shape, 1, 1)
        else:
            yield from _list_linear(name, take_rows(head, part), dtype)


def _table(name: str, table: FloatTable, dtype: str, *shape: int) -> Filled:
    kind = getattr(torch, dtype)

    def blocks() -> Iterator[Array]:
        return (block.to(kind).numpy() for block in table.blocks())

    return Filled(name + PLAIN, Constant(dtype, tuple(shape)), blocks, table=True)
