"""The least-squares steps against float64 minimisers found another way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anequant.quantization import refine
from anequant.quantization.quantize import FittedCore
from anequant.quantization.refine import (
    CODEBOOK_ROWS,
    refit,
    refit_codebook,
    refit_input_scale,
    refit_output_scale,
)


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
    return refit_output_scale(p["weight"], values, p["output_scale"], p["input_scale"], p["hessian"])


def input_step(p: dict[str, Tensor]) -> Tensor:
    values = p["codebook"][p["codes"].int()]
    return refit_input_scale(p["weight"], values, p["output_scale"], p["input_scale"], p["hessian"])


def codebook_step(p: dict[str, Tensor]) -> Tensor:
    return refit_codebook(
        p["weight"], p["codes"], p["codebook"], p["output_scale"], p["input_scale"], p["hessian"]
    )


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
    assert float((gradient * p[part]).abs().max()) <= 1e-3 * float(after.detach())


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


def test_entries_without_codes_stay() -> None:
    p = problem(1)
    p["codes"][p["codes"] == 7] = 6
    assert float(codebook_step(p)[7]) == pytest.approx(float(p["codebook"][7]), rel=1e-5)


def test_a_codebook_whose_order_would_change_stays() -> None:
    p = problem(2)
    p["codes"] = 7 - p["codes"]
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
    fitted = FittedCore(p["codebook"].half().float(), p["input_scale"], p["output_scale"])
    result = refit(p["weight"], p["codes"], fitted, p["hessian"], codebook=codebook, scales=scales)
    assert torch.equal(result.codebook, fitted.codebook) == (codebook == "uniform")
    for value in (result.codebook, result.output_scale, result.input_scale):
        assert torch.equal(value, value.half().float())
    products = result.output_scale[:, None] * result.input_scale
    if scales == "tensor":
        before = fitted.output_scale[:, None] * fitted.input_scale
        torch.testing.assert_close(products, before, rtol=2e-3, atol=0)
    elif scales == "output":
        ratios = (result.input_scale / fitted.input_scale).log()
        assert float(ratios.max() - ratios.min()) < 2e-3
    after = {**p, "codebook": result.codebook, "output_scale": result.output_scale}
    assert float(loss({**after, "input_scale": result.input_scale})) <= float(loss(p)) * 1.01


def test_a_codebook_of_many_entries_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(5, entries=32)
    assert len(p["codebook"]) > refine.LARGEST_CODEBOOK
    fitted = FittedCore(p["codebook"].half().float(), p["input_scale"], p["output_scale"])
    result = refit(p["weight"], p["codes"], fitted, p["hessian"], codebook="lut", scales="balanced")
    assert torch.equal(result.codebook, fitted.codebook)
