"""One function of an asset while its operations are emitted.

Linears are 1x1 convolutions on images [1, channels, 1, positions], as in our Core ML packages. Every constant
with a name is one attribute, whichever functions use it, so the file holds it once; what stands in its place
until `fill_blobs` is its name's hash.

RMSNorm is not an operation of the dialect, and squares of more than 255 leave float16. So what is normalised
is divided by its largest magnitude m first: with h = x / m,

    x / sqrt(mean(x^2) + eps) = h / sqrt(mean(h^2) + eps / m^2)

where h lies in [-1, 1] and mean(h^2) in [1 / n, 1], whatever x is; m counts as at least SMALLEST_PEAK.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anequant.targets.coreai.coreai_toolkit import (
    ConstantOp,
    DenseResourceElementsAttr,
    F16Type,
    F32Type,
    IntegerType,
    RankedTensorType,
    ops,
)
from anequant.targets.coreai.design import CODEBOOK, CODES, Constant, Design

Var = Any
ALIGNMENT = 64
PLACEHOLDER = 16
SMALLEST_PEAK = 2.0**-10


def make_type(dtype: str, shape: Sequence[int]) -> Any:
    """The type of a tensor; signed and unsigned integers of any width, float16 or float32."""
    if dtype.startswith("float"):
        element = {"float16": F16Type, "float32": F32Type}[dtype].get()
    elif dtype.startswith("uint"):
        element = IntegerType.get_unsigned(int(dtype[4:]))
    else:
        element = IntegerType.get_signed(int(dtype[3:]))
    return RankedTensorType.get(list(shape), element)


def make_placeholders(constants: Mapping[str, Constant]) -> dict[str, Any]:
    """An attribute for every constant, with bytes that no other has instead of its own."""
    return {
        name: DenseResourceElementsAttr.get_from_buffer(
            np.frombuffer(hashlib.sha256(name.encode()).digest()[:PLACEHOLDER], np.uint8),
            name,
            make_type(constant.dtype, constant.shape),
            ALIGNMENT,
        )
        for name, constant in constants.items()
    }


class Builder:
    """Emits operations into the function that is open; what is said twice is emitted once."""

    def __init__(self, design: Design, attributes: Mapping[str, Any]) -> None:
        self.design = design
        self.float = np.dtype(design.sizes.dtype)
        self._attributes = attributes
        self._known: dict[Any, Var] = {}

    def has(self, name: str) -> bool:
        return name in self._attributes

    def constant(self, name: str) -> Var:
        """A constant of the design."""
        if name not in self._known:
            self._known[name] = ConstantOp(value=self._attributes[name]).result
        return self._known[name]

    def integers(self, values: Sequence[int] | int, dtype: Any = np.int32) -> Var:
        """A few integers, as operations take them for shapes and axes."""
        array = np.array(values, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = ops.constant(array)
        return self._known[key]

    def number(self, value: float, rank: int = 4) -> Var:
        """A number of the functions' own type, for every element of a tensor of that rank."""
        array = np.full((1,) * rank, value, self.float)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = ops.constant(array)
        return self._known[key]

    def add(self, x: Var, y: Var) -> Var:
        return ops.broadcasting_add(x, y)

    def mul(self, x: Var, y: Var) -> Var:
        return ops.broadcasting_mul(x, y)

    def matmul(self, x: Var, y: Var) -> Var:
        return ops.broadcasting_batch_matmul(x, y)

    def transpose(self, x: Var, *axes: int) -> Var:
        return ops.transpose(x, self.integers(axes, np.uint32))

    def reshape(self, x: Var, *shape: int) -> Var:
        return ops.reshape(x, self.integers(shape, np.uint32))

    def concat(self, parts: Sequence[Var], axis: int) -> Var:
        return parts[0] if len(parts) == 1 else ops.concat(self.integers(axis), list(parts))

    def split(self, x: Var, parts: int, axis: int) -> list[Var]:
        """Equal parts along an axis."""
        shape = list(x.type.shape)
        width = shape[axis] // parts
        if parts == 1:
            return [x]
        return [self.cut(x, axis, part * width, (part + 1) * width) for part in range(parts)]

    def cut(self, x: Var, axis: int, start: int, stop: int) -> Var:
        """What lies from one index of an axis up to another."""
        shape = list(x.type.shape)
        first, last = [0] * len(shape), list(shape)
        first[axis], last[axis] = start, stop
        return ops.slice_(x, self.integers(first), self.integers(last), self.integers([1] * len(shape)))

    def conv(self, x: Var, weight: Var, groups: int = 1) -> Var:
        one = self.integers((1, 1), np.uint32)
        return ops.conv2d(x, weight, one, one, self.integers(groups, np.uint32))

    def look_up(self, name: str) -> Var:
        """A weight: codes into one table."""
        codes, codebook = self.constant(name + CODES), self.constant(name + CODEBOOK)
        return ops.lut_to_dense(codes, codebook, self.integers(0, np.int16))

    def norm(self, x: Var, axis: int, eps: float, gain: str) -> Var:
        """RMSNorm over an axis of rank 4, and its gain where there is one; see the derivation above."""
        peak = ops.reduce_max(ops.abs_(x), self.integers([axis]))
        peak = ops.broadcasting_maximum(peak, self.number(SMALLEST_PEAK))
        scaled = ops.broadcasting_divide(x, peak)
        root = ops.broadcasting_divide(self.number(eps**0.5), peak)
        mean = ops.reduce_mean(self.mul(scaled, scaled), self.integers([axis]))
        normed = self.mul(scaled, ops.rsqrt(self.add(mean, self.mul(root, root))))
        return self.mul(normed, self.constant(gain)) if self.has(gain) else normed
