"""Constants that are streamed to the weight file, against coremltools' own writer and reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anequant.quantization.linear import ROWS, FloatTable
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.program.package import MODEL_FILE, WEIGHT_FILE, save_package
from anequant.targets.coreml.program.program import build_program, shared_constant
from anequant.targets.coreml.program.streaming import streamed_constant
from anequant.targets.coreml.toolkit import TARGET, Function, Program, mb, types

SHAPES = ((ROWS * 2 + 3, 40), (7, 40), (33, 40))
"""Sizes in bytes that are and are not multiples of the alignment; the first in three blocks."""


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).half() for shape in SHAPES]


def table(weight: Tensor) -> FloatTable:
    return FloatTable(range(len(weight)), weight.shape[1], lambda rows: weight[rows])


def program(constant: Callable[[Tensor, str], object]) -> Program:
    with Function({"x": mb.placeholder((1, 40), dtype=types.fp16)}, opset_version=TARGET) as function:
        products = [
            mb.matmul(
                x=function.inputs["x"], y=constant(weight, f"w{number}"), transpose_y=True, name=f"y{number}"
            )
            for number, weight in enumerate(weights())
        ]
        function.set_outputs(products)
    return build_program({"main": function})


def whole(weight: Tensor, name: str) -> object:
    return shared_constant(weight.numpy(), name)


def streamed(weight: Tensor, name: str) -> object:
    return streamed_constant(tuple(weight.shape), table(weight).blocks, name)


def test_streamed_constants_give_the_bytes_of_coremltools_and_run(tmp_path: Path) -> None:
    for name, constant in (("whole", whole), ("streamed", streamed)):
        save_package(program(constant), tmp_path / f"{name}.mlpackage", {})
    for file in (WEIGHT_FILE, MODEL_FILE):
        ours, theirs = (tmp_path / f"{name}.mlpackage" / file for name in ("streamed", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    x = torch.randn(1, 40).half()
    outputs = Package.open(tmp_path / "streamed.mlpackage").run({"x": x})
    for number, weight in enumerate(weights()):
        expected = x.float() @ weight.float().T
        np.testing.assert_allclose(outputs[f"y{number}"].float(), expected, rtol=2e-3, atol=2e-3)


def test_a_program_streams_all_of_its_constants_or_none(tmp_path: Path) -> None:
    def mixed(weight: Tensor, name: str) -> object:
        return (streamed if name == "w1" else whole)(weight, name)

    with pytest.raises(AssertionError, match="not streamed as the others are"):
        save_package(program(mixed), tmp_path / "mixed.mlpackage", {})
    save_package(program(whole), tmp_path / "whole.mlpackage", {})
    assert (tmp_path / "whole.mlpackage").is_dir()


def test_a_float_table_is_read_in_blocks_and_scaled() -> None:
    weight = weights()[0]
    asked: list[slice] = []

    def read(rows: slice) -> Tensor:
        asked.append(rows)
        return weight[rows]

    part = FloatTable(range(len(weight)), 40, read, scale=0.25).part(slice(ROWS - 1, None))
    assert torch.equal(torch.cat(list(part.blocks())), weight[ROWS - 1 :] * 0.25)
    assert part.shape == (ROWS + 4, 40)
    assert max(rows.stop - rows.start for rows in asked) == ROWS
