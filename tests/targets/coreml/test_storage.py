"""Decoding of saved constants, against coremltools' own encoder and decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.backend.mil.helper import create_immediate_value
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types
from coremltools.libmilstoragepython import _BlobStorageWriter
from coremltools.optimize._utils import lut_to_dense
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anequant.errors import InputError
from anequant.targets.coreml.storage import Palettized, Weights, resolve_below
from anequant.targets.coreml.toolkit import MIL_pb2 as MIL

Array = np.ndarray[Any, Any]

UNSIGNED = {n: getattr(types, f"np_uint{n}_dtype") for n in (1, 2, 3, 4, 6)} | {8: np.uint8, 16: np.uint16}
SIGNED = {4: types.np_int4_dtype, 8: np.int8, 16: np.int16, 32: np.int32}


def read_tensor(folder: Path, value: Any) -> Tensor:
    read = Weights(folder).read(value)
    assert isinstance(read, Tensor)
    return read


@pytest.mark.parametrize("bits", [*UNSIGNED, *(-n for n in SIGNED)])
def test_immediate_integers(tmp_path: Path, bits: int) -> None:
    low, high = (0, 2**bits) if bits > 0 else (-(2 ** (-bits - 1)), 2 ** (-bits - 1))
    values = np.random.default_rng(0).integers(low, high, (3, 7))
    values[0, :2] = low, high - 1
    array = values.astype(UNSIGNED[bits] if bits > 0 else SIGNED[-bits])
    with Function({"unused": mb.placeholder((1,))}):
        value = create_immediate_value(mb.const(val=array))
    np.testing.assert_array_equal(read_tensor(tmp_path, value).numpy(), values)


@pytest.mark.parametrize(
    "array", [np.array([[1.5, -0.0]], np.float16), np.float32(2.5), np.array([True, False]), "valid"]
)
def test_immediate_values(tmp_path: Path, array: Any) -> None:
    with Function({"unused": mb.placeholder((1,))}):
        value = create_immediate_value(mb.const(val=array))
    read = Weights(tmp_path).read(value)
    assert read == array if isinstance(read, str) else np.array_equal(read.numpy(), array)


KINDS = [
    ("fp16", "FLOAT16"),
    ("float", "FLOAT32"),
    ("int8", "INT8"),
    ("int32", "INT32"),
    ("uint16", "UINT16"),
]


@pytest.mark.parametrize(("blob", "mil"), KINDS)
def test_values_in_a_weight_file(tmp_path: Path, blob: str, mil: str) -> None:
    numpy_type = {"fp16": "float16", "float": "float32"}.get(blob, blob)
    values = np.arange(24).astype(numpy_type)
    writer = _BlobStorageWriter(str(tmp_path / "w.bin"))
    offset = getattr(writer, f"write_{blob}_data")(values.view(np.uint16) if blob == "fp16" else values)
    del writer
    value = MIL.Value()
    value.blobFileValue.fileName, value.blobFileValue.offset = "@model_path/w.bin", offset
    value.type.tensorType.dataType = MIL.DataType.Value(mil)
    for size in (4, 6):
        value.type.tensorType.dimensions.add().constant.size = size
    np.testing.assert_array_equal(read_tensor(tmp_path, value).numpy(), values.reshape(4, 6))
    value.type.tensorType.dimensions[0].constant.size = 5
    with pytest.raises(InputError, match=r"shape \(5, 6\) has 24 values"):
        Weights(tmp_path).read(value)
    value.blobFileValue.fileName = "@model_path/../w.bin"
    with pytest.raises(InputError, match="leaves the package"):
        Weights(tmp_path).read(value)


@st.composite
def palettes(draw: st.DrawFn) -> tuple[Array, Array, int]:
    """Codes, codebook and axis, with every way to group the codes."""
    groups = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    blocks = [draw(st.integers(1, 3)) for _ in groups]
    bits, width = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 3))
    axis = draw(st.integers(-len(groups), len(groups) - 1))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    codes = generator.integers(0, 2**bits, np.multiply(groups, blocks)).astype(np.uint8)
    return codes, generator.standard_normal((*groups, 2**bits, width)).astype(np.float16), axis


@given(palettes(), st.data())
def test_palettized(palette: tuple[Array, Array, int], data: st.DataObject) -> None:
    codes, codebook, axis = palette
    weight = Palettized(torch.from_numpy(codes), torch.from_numpy(codebook), axis)
    dense = lut_to_dense(codes, codebook, axis)
    np.testing.assert_array_equal(weight.dense().numpy(), dense)
    assert weight.dense(torch.float32).dtype == torch.float32
    if axis % codes.ndim != 0 or codebook.shape[-1] == 1:
        index = data.draw(st.lists(st.integers(0, len(codes) - 1), min_size=1, max_size=5))
        np.testing.assert_array_equal(weight.rows(torch.tensor(index)).dense().numpy(), dense[index])


@pytest.mark.parametrize("name", ["..", "a/../../b", "/a", "\\a", "a\\..\\b", "c:a", "", "a\0b"])
def test_inside_refuses(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="leaves the package"):
        resolve_below(tmp_path, name)


def test_inside_accepts(tmp_path: Path) -> None:
    assert (
        resolve_below(tmp_path, "com.apple.CoreML/./model.mlmodel")
        == tmp_path / "com.apple.CoreML" / "model.mlmodel"
    )
