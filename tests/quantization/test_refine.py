"""The least-squares steps against float64 minimisers found another way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anequant.quantization.nearest import FittedCore
from anequant.quantization.refine import (
    CODEBOOK_ROWS,
    LARGEST_CODEBOOK,
    refit,
    refit_codebook,
    refit_input_scale,
    refit_output_scale,
)
from anequant.quantization.weight_format import WeightFormat


def problem(seed: int, rows: int = 24, columns: int = 20, entries: int = 8) -> dict[str, Tensor]:
    """A weight, codes of it that are good but not best, and a Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.linspace(-2, 2, entries) + 0.1 * torch.rand(entries, generator=generator)
    output_scale = torch.rand(rows, generator=generator) + 0.5
    input_scale = torch.rand(columns, generator=generator) + 0.5
    weight = torch.randn(rows, columns, generator=generator) * output_scale[:, None] * input_scale
    core = weight / output_scale[:, None] / input_scale
    codes = (core[..., None] - codebook).abs().argmin(-1).to(torch.uint8)
    inputs = torch.randn(3 * columns, columns, generator=generator).cumsum(1)
    return {
        "weight": weight,
        "codes": codes,
        "codebook": codebook,
        "output_scale": output_scale,
        "input_scale": input_scale,
        "hessian": inputs.T @ inputs / len(inputs),
    }


def loss(p: dict[str, Tensor]) -> Tensor:
    """tr(E H E^T) in float64, by the definition."""
    values = p["codebook"].double()[p["codes"].long()]
    rounded = p["output_scale"].double()[:, None] * values * p["input_scale"].double()
    error = p["weight"].double() - rounded
    return (error @ p["hessian"].double() * error).sum()


def output_step(p: dict[str, Tensor]) -> Tensor:
    values = p["codebook"][p["codes"].int()]
    rounded = p["output_scale"][:, None] * values * p["input_scale"]
    return refit_output_scale(rounded, rounded @ p["hessian"], p["weight"] @ p["hessian"], p["output_scale"])


def input_step(p: dict[str, Tensor]) -> Tensor:
    scaled = p["output_scale"][:, None] * p["codebook"][p["codes"].int()]
    return refit_input_scale(scaled, p["input_scale"], p["hessian"], p["weight"] @ p["hessian"])


def codebook_step(p: dict[str, Tensor]) -> Tensor:
    scales, pull = (p["output_scale"], p["input_scale"]), p["weight"] @ p["hessian"]
    return refit_codebook(p["codes"], p["codebook"], *scales, p["hessian"], pull)


def all_steps(p: dict[str, Tensor], fitted: FittedCore, codebook: str, scales: str) -> FittedCore:
    error = p["weight"] - fitted.linear(p["codes"], None).dequantize()
    pulls = p["weight"] @ p["hessian"], error @ p["hessian"]
    return refit(*pulls, p["codes"], fitted, p["hessian"], WeightFormat(4, codebook, scales))


STEPS = {"output_scale": output_step, "input_scale": input_step, "codebook": codebook_step}
each_step = pytest.mark.parametrize(("part", "step"), STEPS.items(), ids=list(STEPS))


@each_step
@pytest.mark.parametrize("seed", range(4))
def test_a_step_ends_where_the_gradient_is_zero(
    part: str, step: Callable[[dict[str, Tensor]], Tensor], seed: int
) -> None:
    p = problem(seed)
    before = loss(p)
    p[part] = step(p).double().requires_grad_()
    after = loss(p)
    (gradient,) = torch.autograd.grad(after, p[part])
    assert bool(after < before)
    assert float((gradient * p[part]).abs().max().detach()) <= 1e-3 * float(after.detach())


def least_squares(p: dict[str, Tensor], part: str) -> Tensor:
    """The minimiser by QR in float64: with H = L L^T, the loss is ||(W - rounded) L||^2, and rounded is a
    sum of one matrix for each number of the part."""
    factor = torch.linalg.cholesky(p["hessian"].double())
    values = p["codebook"].double()[p["codes"].long()]
    rows, columns = p["output_scale"].double()[:, None], p["input_scale"].double()
    matrices = []
    for k in range(len(p[part])):
        one = torch.zeros(len(p[part]), dtype=torch.float64)
        one[k] = 1
        parts = {
            "output_scale": lambda one=one: one[:, None] * values * columns,
            "input_scale": lambda one=one: rows * values * one,
            "codebook": lambda one=one: rows * one[p["codes"].long()] * columns,
        }
        matrices.append((parts[part]() @ factor).flatten())
    wanted = (p["weight"].double() @ factor).flatten()
    solution: Tensor = torch.linalg.lstsq(torch.stack(matrices, 1), wanted[:, None]).solution
    return solution[:, 0]


@each_step
@pytest.mark.parametrize("seed", range(4))
def test_a_step_is_the_least_squares_solution(
    part: str, step: Callable[[dict[str, Tensor]], Tensor], seed: int
) -> None:
    """Up to the ridge, which pulls towards the start by a millionth of the mean curvature."""
    p = problem(seed)
    torch.testing.assert_close(step(p).double(), least_squares(p, part), rtol=5e-5, atol=5e-5)


@each_step
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 30), st.sampled_from([2, 4, 16]))
def test_a_step_never_raises_the_error(
    part: str, step: Callable[[dict[str, Tensor]], Tensor], seed: int, rows: int, columns: int, entries: int
) -> None:
    p = problem(seed, rows, columns, entries)
    before = float(loss(p))
    p[part] = step(p)
    assert float(loss(p)) <= before * (1 + 1e-5) + 1e-9


def test_output_scales_that_would_not_be_positive_stay() -> None:
    p = problem(0)
    p["weight"][3] = -p["weight"][3]
    result = output_step(p)
    assert result[3] == p["output_scale"][3]
    assert bool((result > 0).all())


def test_input_scales_stay_when_one_would_not_be_positive() -> None:
    p = problem(0)
    p["weight"][:, 3] = -p["weight"][:, 3]
    assert bool((least_squares(p, "input_scale") <= 0).any())
    assert torch.equal(input_step(p), p["input_scale"])


def test_scales_of_what_is_not_seen_stay() -> None:
    """An input that is always zero, and a row of zeros."""
    p = problem(0)
    p["hessian"][3, :] = p["hessian"][:, 3] = 0
    p["codebook"][4], p["codes"][5] = 0, 4
    columns, rows = input_step(p), output_step(p)
    assert float(columns[3]) == pytest.approx(float(p["input_scale"][3]), rel=1e-5)
    assert rows[5] == p["output_scale"][5]
    assert float(loss({**p, "input_scale": columns})) < 0.99 * float(loss(p))
    assert float(loss({**p, "output_scale": rows})) < 0.99 * float(loss(p))


def test_entries_without_codes_stay() -> None:
    p = problem(1)
    p["codes"][p["codes"] == 7] = 6
    entries = codebook_step(p)
    assert float(entries[7]) == pytest.approx(float(p["codebook"][7]), rel=1e-5)
    assert float(loss({**p, "codebook": entries})) < 0.99 * float(loss(p))


def test_a_codebook_whose_order_would_change_stays() -> None:
    p = problem(2)
    p["codes"] = 7 - p["codes"]
    assert bool((least_squares(p, "codebook").diff() < 0).any())
    assert torch.equal(codebook_step(p), p["codebook"])


def test_many_rows_are_represented_by_some() -> None:
    p = problem(3, rows=4 * CODEBOOK_ROWS)
    rows = slice(0, None, 4)
    some = {
        name: value[rows] if name in ("weight", "codes", "output_scale") else value
        for name, value in p.items()
    }
    assert torch.equal(codebook_step(p), codebook_step(some))


@pytest.mark.parametrize("codebook", ["uniform", "lut"])
@pytest.mark.parametrize("scales", ["tensor", "output", "balanced"])
def test_refit_leaves_alone_what_the_recipe_fixes(codebook: str, scales: str) -> None:
    p = problem(4)
    for part in STEPS:
        p[part] = p[part].half().float()
    fitted = FittedCore(p["codebook"], p["input_scale"], p["output_scale"])
    result = all_steps(p, fitted, codebook, scales)
    assert torch.equal(result.codebook, fitted.codebook) == (codebook == "uniform")
    assert torch.equal(result.output_scale, fitted.output_scale) == (scales == "tensor")
    assert torch.equal(result.input_scale, fitted.input_scale) == (scales != "balanced")
    for value in (result.codebook, result.output_scale, result.input_scale):
        assert torch.equal(value, value.half().float())


@pytest.mark.parametrize("codebook", ["uniform", "lut"])
@pytest.mark.parametrize("scales", ["tensor", "output", "balanced"])
def test_refit_takes_the_steps_in_turn(codebook: str, scales: str) -> None:
    """Rows, entries, columns, each the best for what came before; then float16 rounds three numbers."""
    p = problem(4)
    fitted = FittedCore(p["codebook"], p["input_scale"], p["output_scale"])
    result = all_steps(p, fitted, codebook, scales)
    free = {"output_scale": scales != "tensor", "codebook": codebook == "lut"}
    for part in [*(part for part in free if free[part]), *(["input_scale"] if scales == "balanced" else [])]:
        p[part] = least_squares(p, part)
    expected = p["output_scale"][:, None] * p["codebook"][p["codes"].long()] * p["input_scale"]
    rounded = result.linear(p["codes"], None).dequantize()
    torch.testing.assert_close(rounded.double(), expected.double(), rtol=1.1 * 3 * 2.0**-11, atol=1e-4)
    if scales == "balanced":
        assert float(result.input_scale.log().mean()) == pytest.approx(0, abs=2.0**-11)


def test_a_codebook_of_many_entries_stays() -> None:
    p = problem(5, rows=400, entries=32)
    assert not torch.equal(codebook_step(p), p["codebook"])
    assert len(p["codebook"]) > LARGEST_CODEBOOK
    fitted = FittedCore(p["codebook"].half().float(), p["input_scale"], p["output_scale"])
    result = all_steps(p, fitted, "lut", "balanced")
    assert torch.equal(result.codebook, fitted.codebook)
