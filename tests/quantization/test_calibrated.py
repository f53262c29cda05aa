"""quantize_calibrated on layers whose inputs are known, token by token."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from rounding import descended, gptq_codes
from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.quantization import calibrated
from anequant.quantization.calibrated import (
    DAMPINGS,
    TARGET_DAMPING,
    Rounding,
    correct_target,
    quantize_calibrated,
)
from anequant.quantization.codebook import find_nearest_codes
from anequant.quantization.gptq import Grid, Rounded, damp, evaluate_codes, factorize
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import fit_core, quantize_linear
from anequant.quantization.statistics import InputStatistics, Moments, measure_output_loss
from anequant.quantization.weight_format import WeightFormat

BALANCED = WeightFormat(4, "lut", "balanced")
PLAIN = Rounding(BALANCED, correction=0.0, descent=0, refinement=0)
FULL = Rounding(BALANCED, correction=0.5, descent=2, refinement=4)
ROWS, COLUMNS = 48, 64


def weight(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, COLUMNS, generator=generator) * (
        torch.rand(COLUMNS, generator=generator) * 2 + 0.2
    )


def tokens(count: int, seed: int, drift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Inputs x [count, in] of the quantized model and x_float of the float model, `drift` apart."""
    mix = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(99)) / 8 + torch.eye(COLUMNS)
    generator = torch.Generator().manual_seed(seed)
    x_float = torch.randn(count, COLUMNS, generator=generator) @ mix
    return x_float + drift * torch.randn(count, COLUMNS, generator=generator) @ mix, x_float


def moments(x: Tensor, x_float: Tensor) -> Moments:
    return Moments(x.T @ x / len(x), len(x), x_float.T @ x / len(x))


def statistics(count: int, drift: float = 0.0) -> InputStatistics:
    held_out = max(1, count // 6)
    return InputStatistics(moments(*tokens(count, 1, drift)), moments(*tokens(held_out, 2, drift)))


def run(seen: InputStatistics, rounding: Rounding, value: Tensor | None = None) -> QuantizedLinear:
    return quantize_calibrated(weight() if value is None else value, None, seen, rounding, "layer.p")[0]


def fresh_error(quantized: QuantizedLinear, drift: float = 0.0) -> float:
    """E||W x_float - Q x||^2 over tokens that nothing was fitted to."""
    x, x_float = tokens(4000, 3, drift)
    return float((x_float @ weight().T - x @ quantized.dequantize().T).square().sum(1).mean())


def test_each_ingredient_pays_on_fresh_tokens() -> None:
    nearest = quantize_linear(weight(), None, BALANCED, "p")
    errors = [
        fresh_error(nearest, 0.1),
        fresh_error(run(statistics(3000, 0.1), PLAIN), 0.1),
        fresh_error(run(statistics(3000, 0.1), FULL), 0.1),
    ]
    assert errors[1] < 0.85 * errors[0]
    assert errors[2] < 0.97 * errors[1]


@pytest.mark.parametrize("codebook", ["uniform", "lut"])
@pytest.mark.parametrize("scales", ["tensor", "output", "balanced"])
def test_more_bits_are_closer(codebook: str, scales: str) -> None:
    seen = statistics(1000)
    formats = [WeightFormat(bits, codebook, scales) for bits in (2, 3, 4, 6, 8)]
    errors = [fresh_error(run(seen, Rounding(format_, 0.5, 1, 2))) for format_ in formats]
    assert all(2 * after < before for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("descent", [0, 2])
@pytest.mark.parametrize(("count", "trial_rows"), [(24, 256), (100, 256), (100, 8), (3000, 256)])
def test_the_damping_is_the_best_on_held_out_tokens(
    monkeypatch: pytest.MonkeyPatch, count: int, trial_rows: int, descent: int
) -> None:
    """Nearest rounding is a candidate, so that no choice is worse than it, however few the tokens. What is
    chosen with the fit's tokens alone is then done with all."""
    monkeypatch.setattr(calibrated, "TRIAL_ROWS", trial_rows)
    rows = slice(0, None, max(1, ROWS // trial_rows))
    seen = statistics(count)
    x, x_float = (value.double() for value in tokens(seen.held_out.tokens, 2))
    fitted = fit_core(weight(), BALANCED, "p")

    def codes(damping: float | None, of: Moments, passes: int) -> Tensor:
        if damping is None:
            return find_nearest_codes(fitted.core(weight()), fitted.codebook)
        hessian = damp(of.hessian, factorize(of.hessian, damping).ridge)
        result = gptq_codes(weight(), fitted.codebook, hessian, fitted.step)
        for _ in range(passes):
            result = descended(weight(), fitted.codebook, hessian, result, fitted.step)
        return result

    def error(damping: float | None) -> float:
        rounded = fitted.linear(codes(damping, seen.fit, 0), None).dequantize().double()
        return float((x_float @ weight().double().T - x @ rounded.T)[:, rows].square().sum())

    result, chosen = quantize_calibrated(weight(), None, seen, replace(PLAIN, descent=descent), "p")
    assert chosen == min((None, *DAMPINGS), key=error)
    assert torch.equal(result.codes, codes(chosen, seen.everything, descent))


def test_few_tokens_do_no_harm_on_fresh_ones() -> None:
    """Fewer tokens than inputs, and everything fitted to them."""
    nearest = quantize_linear(weight(), None, BALANCED, "p")
    assert fresh_error(run(statistics(24), PLAIN)) < fresh_error(nearest)


def test_nearest_is_chosen_where_feedback_would_hurt() -> None:
    """Held-out tokens whose inputs are independent, when the fit saw one direction only."""
    x = torch.ones(8, COLUMNS) + 0.01 * torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(5))
    alone = torch.eye(COLUMNS)
    seen = InputStatistics(moments(x, x), Moments(alone, 10_000, alone))
    result, damping = quantize_calibrated(weight(), None, seen, PLAIN, "p")
    nearest = quantize_linear(weight(), None, BALANCED, "p")
    assert damping is None
    assert torch.equal(result.codes, nearest.codes)


@pytest.mark.parametrize("rounds", [1, 4, 40])
def test_accepted_refinements_lower_the_error(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """Forty rounds are more than it takes until one no longer helps."""
    losses: list[float] = []
    candidates: list[Tensor] = []
    passes = calibrated._descend

    def note(grid: Grid, hessian: Tensor, current: Rounded) -> None:
        candidates.append((grid.codebook[current.codes.int()] * grid.step).T)
        error = (grid.target.T - candidates[-1]).double()
        losses.append(current.loss())
        assert losses[-1] == pytest.approx(float((error @ hessian.double() * error).sum()), rel=1e-4)

    def noted(grid: Grid, hessian: Tensor, codes: Tensor) -> Rounded:
        current = evaluate_codes(grid, hessian, codes)
        if not losses:
            note(grid, hessian, current)
        return current

    def descend(grid: Grid, hessian: Tensor, current: Rounded, count: int, coupling: None) -> None:
        assert count == FULL.descent
        passes(grid, hessian, current, count, coupling)
        note(grid, hessian, current)

    monkeypatch.setattr(calibrated, "evaluate_codes", noted)
    monkeypatch.setattr(calibrated, "_descend", descend)
    result = run(statistics(3000), replace(FULL, refinement=rounds))
    if rounds == 40:
        assert len(losses) < 1 + rounds and losses[-1] >= losses[-2]
    else:
        assert len(losses) == 1 + rounds
    accepted = losses if losses[-1] < losses[-2] else losses[:-1]
    assert accepted == sorted(accepted, reverse=True) and accepted[-1] < accepted[0]
    torch.testing.assert_close(result.dequantize(), candidates[len(accepted) - 1], rtol=1e-6, atol=0)
    without = run(statistics(3000), Rounding(BALANCED, 0.5, 2, 0))
    assert fresh_error(result) < fresh_error(without)


def test_the_correction_solves_its_normal_equations() -> None:
    x, x_float = (value.double() for value in tokens(2000, 1, 0.3))
    seen = moments(x, x_float)
    assert seen.cross is not None
    target = correct_target(weight(), Moments(seen.hessian.float(), 2000, seen.cross.float()), 1.0)
    ridge = TARGET_DAMPING * float(seen.hessian.diagonal().mean())
    wanted = x_float @ weight().double().T
    assert target.pull is not None
    exact = target.values.double() @ seen.hessian
    assert float((target.pull.double() - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    free = target.values.double().requires_grad_()
    loss = (x @ free.T - wanted).square().sum() / len(x) + ridge * (free - weight().double()).square().sum()
    (gradient,) = torch.autograd.grad(loss, free)
    assert float(gradient.abs().max()) < 1e-4
    half = correct_target(weight(), Moments(seen.hessian.float(), 2000, seen.cross.float()), 0.5)
    torch.testing.assert_close(half.values, (weight() + target.values) / 2, rtol=1e-4, atol=1e-5)
    none = correct_target(weight(), Moments(seen.hessian.float(), 1, seen.cross.float()), 0)
    assert torch.equal(none.values, weight())


def test_everything_is_all_tokens_together() -> None:
    first, second = tokens(300, 1, 0.2), tokens(90, 2, 0.2)
    pooled = InputStatistics(moments(*first), moments(*second)).everything
    whole = moments(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    assert pooled.tokens == whole.tokens == 390
    torch.testing.assert_close(pooled.hessian, whole.hessian)
    torch.testing.assert_close(pooled.cross, whole.cross)


def test_output_loss_is_the_squared_error_up_to_a_constant() -> None:
    x, x_float = tokens(500, 4, 0.2)
    generator = torch.Generator().manual_seed(7)
    candidates = [weight() + 0.1 * torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(3)]
    literal = [float((x_float @ weight().T - x @ q.T).square().sum(1).mean()) for q in candidates]
    seen = moments(x, x_float)
    ours = [measure_output_loss(q, seen.project(weight()), seen.hessian) for q in candidates]
    constant = float((x_float @ weight().T).square().sum(1).mean())
    assert ours == pytest.approx([value - constant for value in literal], rel=1e-4)


def test_dead_inputs_are_counted_and_survive() -> None:
    x, x_float = tokens(600, 1)
    for dead in (0, 7, 63):
        x[:, dead] = 0
    seen = InputStatistics(moments(x[:500], x_float[:500]), moments(x[500:], x_float[500:]))
    assert seen.dead_inputs == 3
    assert statistics(600).dead_inputs == 0
    result = run(seen, FULL)
    assert bool(result.dequantize().isfinite().all())


@pytest.mark.parametrize("damaged", ["zero", "rank one"])
def test_singular_statistics_are_no_obstacle(damaged: str) -> None:
    one = torch.outer(torch.arange(1.0, COLUMNS + 1), torch.arange(1.0, COLUMNS + 1))
    hessian = torch.zeros(COLUMNS, COLUMNS) if damaged == "zero" else one
    seen = Moments(hessian, 100, hessian.clone())
    result = run(InputStatistics(seen, seen), FULL)
    error = float((result.dequantize() - weight()).norm() / weight().norm())
    assert error < 0.2


@pytest.mark.parametrize("part", ["hessian", "cross"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(part: str, value: float) -> None:
    seen = statistics(100)
    getattr(seen.fit, part)[5, 5] = value
    with pytest.raises(UnsupportedError, match=r"inputs of 'layer\.p'.*not all finite"):
        run(seen, FULL)


def test_the_bias_is_kept_as_float16_holds_it() -> None:
    bias = torch.linspace(-3, 3, ROWS)
    seen = statistics(500)
    result, _ = quantize_calibrated(weight(), bias, seen, FULL, "p")
    assert result.bias is not None and torch.equal(result.bias, bias.half().float())
    assert torch.equal(result.dequantize(), run(seen, FULL).dequantize())
    with pytest.raises(UnsupportedError, match="'p'"):
        quantize_calibrated(weight(), bias * 1e5, seen, FULL, "p")


def test_the_same_statistics_give_the_same_linear() -> None:
    first, second = run(statistics(500, 0.1), FULL), run(statistics(500, 0.1), FULL)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.codebook, second.codebook)
    assert torch.equal(first.output_scale, second.output_scale)
    assert torch.equal(first.input_scale, second.input_scale)
