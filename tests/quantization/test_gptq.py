"""gptq and descent against literal, column-by-column float64 versions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import descended, gptq_codes
from torch import Tensor

from anequant.quantization import gptq
from anequant.quantization.codebook import find_nearest_codes
from anequant.quantization.gptq import DAMPING_GROWTH, Grid, damp, evaluate_codes, factorize
from anequant.quantization.kernels import TILE

BLOCK = 16


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Literal versions take long; what happens between blocks shows with small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "BLOCK", BLOCK)
        yield


def problem(rows: int, columns: int, entries: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A core [rows, columns], an ascending codebook [entries] and a Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(rows, columns, generator=generator)
    codebook = torch.randn(entries, generator=generator).sort().values
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mix
    inputs *= torch.rand(columns, generator=generator) * 3 + 0.1
    hessian = inputs.T @ inputs / len(inputs)
    return core, codebook, damp(hessian, factorize(hessian, 0.01).ridge)


def objective(core: Tensor, codebook: Tensor, hessian: Tensor, codes: Tensor) -> float:
    error = core.double() - codebook.double()[codes.long()]
    return float((error @ hessian.double() * error).sum())


def classic_gptq(core: Tensor, codebook: Tensor, hessian: Tensor) -> Tensor:
    """Frantar et al. 2022, equations 2 and 3: the inverse of what is left is taken anew at every step."""
    values, entries = core.double().clone(), codebook.double()
    order = hessian.diagonal().argsort(stable=True).flip(0).tolist()
    codes = torch.empty(core.shape, dtype=torch.uint8)
    for done, column in enumerate(order):
        left = order[done:]
        inverse = torch.linalg.inv(hessian.double()[left][:, left])
        chosen = (values[:, column, None] - entries).abs().argmin(1)
        codes[:, column] = chosen
        step = (values[:, column] - entries[chosen]) / inverse[0, 0]
        for place, other in enumerate(left[1:], start=1):
            values[:, other] -= step * inverse[0, place]
    return codes


@pytest.mark.parametrize("columns", [1, 2, 17, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("entries", [2, 16])
def test_codes_are_those_of_classic_gptq(columns: int, entries: int) -> None:
    core, codebook, hessian = problem(6, columns, entries, seed=columns)
    assert torch.equal(gptq_codes(core, codebook, hessian), classic_gptq(core, codebook, hessian))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("columns", [2, 3])
def test_every_step_is_the_best_given_those_before(columns: int, seed: int) -> None:
    """Of all entries, with the columns still to come free to take any real value; the last has none."""
    core, codebook, hessian = problem(5, columns, 4, seed)
    codes = gptq_codes(core, codebook, hessian)
    full = hessian.double()
    order = full.diagonal().argsort(descending=True).tolist()
    for done in range(1, columns + 1):
        fixed, free = order[:done], order[done:]
        cross = full[fixed][:, free]
        left = full[fixed][:, fixed] - cross @ torch.linalg.solve(full[free][:, free], cross.T)
        losses = []
        for entry in range(len(codebook)):
            codes_here = codes.clone()
            codes_here[:, order[done - 1]] = entry
            error = (core.double() - codebook.double()[codes_here.long()])[:, fixed]
            losses.append((error @ left * error).sum(1))
        assert torch.equal(torch.stack(losses).argmin(0), codes[:, order[done - 1]].long())


def test_independent_inputs_are_rounded_to_nearest() -> None:
    core, codebook, _ = problem(9, 150, 16)
    hessian = torch.diag(torch.rand(150, generator=torch.Generator().manual_seed(1)) + 0.1)
    assert torch.equal(gptq_codes(core, codebook, hessian), find_nearest_codes(core, codebook))
    assert torch.equal(
        descended(core, codebook, hessian, torch.zeros(9, 150, dtype=torch.uint8)),
        find_nearest_codes(core, codebook),
    )


def test_the_order_of_inputs_does_not_matter() -> None:
    core, codebook, hessian = problem(8, 100, 16)
    shuffle = torch.randperm(100, generator=torch.Generator().manual_seed(3))
    shuffled = gptq_codes(core[:, shuffle], codebook, hessian[shuffle][:, shuffle])
    assert torch.equal(shuffled, gptq_codes(core, codebook, hessian)[:, shuffle])


@pytest.mark.parametrize("seed", range(5))
def test_error_feedback_beats_nearest_rounding(seed: int) -> None:
    core, codebook, hessian = problem(16, 96, 16, seed)
    nearest = objective(core, codebook, hessian, find_nearest_codes(core, codebook))
    fed = gptq_codes(core, codebook, hessian)
    assert objective(core, codebook, hessian, fed) < 0.9 * nearest
    assert objective(core, codebook, hessian, descended(core, codebook, hessian, fed)) < objective(
        core, codebook, hessian, fed
    )


def literal_descent(core: Tensor, codebook: Tensor, hessian: Tensor, codes: Tensor) -> Tensor:
    """Every code in turn becomes the best of all entries while the others stay."""
    codes = codes.clone()
    for row, column in itertools.product(range(core.shape[0]), range(core.shape[1])):
        losses = []
        for entry in range(len(codebook)):
            codes[row, column] = entry
            losses.append(objective(core[row : row + 1], codebook, hessian, codes[row : row + 1]))
        codes[row, column] = min(range(len(codebook)), key=losses.__getitem__)
    return codes


@pytest.mark.parametrize("columns", [1, 5, BLOCK, 2 * BLOCK + 5])
def test_descent_is_the_literal_one(columns: int) -> None:
    core, codebook, hessian = problem(3, columns, 4, seed=columns)
    generator = torch.Generator().manual_seed(columns)
    start = torch.randint(4, core.shape, generator=generator, dtype=torch.uint8)
    expected = literal_descent(core, codebook, hessian, start)
    assert torch.equal(descended(core, codebook, hessian, start), expected)


@given(st.integers(1, 6), st.integers(1, 2 * BLOCK + 2), st.sampled_from([2, 4, 16]), st.integers(0, 10**6))
def test_descent_never_raises_the_error(rows: int, columns: int, entries: int, seed: int) -> None:
    core, codebook, hessian = problem(rows, columns, entries, seed)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(entries, (rows, columns), generator=generator, dtype=torch.uint8)
    before = objective(core, codebook, hessian, codes)
    for _ in range(3):
        codes = descended(core, codebook, hessian, codes)
        after = objective(core, codebook, hessian, codes)
        assert after <= before * (1 + 1e-5)
        before = after


def test_the_best_codes_are_left_alone() -> None:
    core, codebook, hessian = problem(4, 3, 4)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)), dtype=torch.uint8)
    best = torch.stack(
        [min(every, key=lambda codes: objective(row[None], codebook, hessian, codes[None])) for row in core]
    )
    assert torch.equal(descended(core, codebook, hessian, best), best)


# --- errors of rows that count together -----------------------------------------------------------------


def couple(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """A positive definite matrix [rows, rows] that is zero between tiles, and its tiles."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.zeros(-(-rows // TILE), TILE, TILE)
    whole = torch.zeros(rows, rows)
    for tile, start in zip(tiles, range(0, rows, TILE), strict=True):
        count = min(TILE, rows - start)
        mix = torch.randn(count, count, generator=generator)
        tile[:count, :count] = mix @ mix.T / count + 0.3 * torch.eye(count)
        whole[start : start + count, start : start + count] = tile[:count, :count]
    return whole, tiles


def coupled_objective(
    core: Tensor, codebook: Tensor, hessian: Tensor, coupling: Tensor, codes: Tensor
) -> float:
    error = core.double() - codebook.double()[codes.long()]
    return float((coupling.double() @ error @ hessian.double() * error).sum())


@pytest.mark.parametrize(("rows", "columns"), [(5, 1), (7, BLOCK), (4, 2 * BLOCK + 3), (TILE + 2, 3)])
def test_coupled_descent_is_the_literal_one(rows: int, columns: int) -> None:
    """A column after the other, and in it a row after the other: each code becomes the best of all entries.
    Rows of two tiles do not see each other."""
    core, codebook, hessian = problem(rows, columns, 3, seed=columns)
    whole, tiles = couple(rows, columns)
    start = torch.randint(3, core.shape, generator=torch.Generator().manual_seed(rows), dtype=torch.uint8)
    codes = start.clone()
    entries, error = codebook.double(), core.double() - codebook.double()[start.long()]
    for column, row in itertools.product(range(columns), range(rows)):
        slope = float(whole[row].double() @ error @ hessian[:, column].double())
        curve = float(whole[row, row] * hessian[column, column])
        moves = core[row, column].double() - entries - error[row, column]
        best = int((2 * slope * moves + curve * moves.square()).argmin())
        codes[row, column], error[row, column] = best, core[row, column].double() - entries[best]
    assert torch.equal(descended(core, codebook, hessian, start, coupling=tiles), codes)
    losses = [coupled_objective(core, codebook, hessian, whole, each) for each in (start, codes)]
    assert losses[1] < losses[0]
    grid = Grid(core.T.contiguous(), torch.ones(columns, rows), codebook)
    rounded = evaluate_codes(grid, hessian, codes.T.contiguous())
    assert rounded.loss(tiles) == pytest.approx(losses[1], rel=1e-4)


def test_rows_that_do_not_couple_descend_as_they_do_alone() -> None:
    core, codebook, hessian = problem(9, BLOCK + 4, 4)
    start = torch.zeros(core.shape, dtype=torch.uint8)
    alone = torch.eye(TILE)[None] * 0.7
    assert torch.equal(
        descended(core, codebook, hessian, start, coupling=alone), descended(core, codebook, hessian, start)
    )


# --- damping ------------------------------------------------------------------------------------------


def test_damping_is_a_share_of_the_mean() -> None:
    _, _, hessian = problem(1, 40, 4)
    factor = factorize(hessian, 0.1)
    assert factor.damping == 0.1
    result = damp(hessian, factor.ridge)
    expected = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("rank", [1, 5])
def test_damping_grows_only_until_the_hessian_is_definite(rank: int) -> None:
    inputs = torch.randn(rank, 30, generator=torch.Generator().manual_seed(rank)) * 10
    singular = inputs.T @ inputs
    factor = factorize(singular, 1e-13)
    result, used = damp(singular, factor.ridge), factor.damping
    assert bool(torch.linalg.eigvalsh(result.double()).min() > 0)
    assert used > 1e-13
    less = singular + used / DAMPING_GROWTH * singular.diagonal().mean() * torch.eye(30)
    with pytest.raises(RuntimeError, match="not positive-definite"):
        torch.linalg.cholesky(less[factor.order][:, factor.order])
    assert factorize(singular, 0.05).damping == 0.05


def test_a_hessian_of_zeros_becomes_a_multiple_of_the_identity() -> None:
    core, codebook, _ = problem(3, 30, 4)
    factor = factorize(torch.zeros(30, 30), 0.05)
    result = damp(torch.zeros(30, 30), factor.ridge)
    assert factor.damping == 0.05
    assert torch.equal(result, 0.05 * torch.eye(30))
    assert torch.equal(gptq_codes(core, codebook, result), find_nearest_codes(core, codebook))


def test_dead_inputs_are_rounded_to_nearest() -> None:
    core, codebook, hessian = problem(7, 90, 16)
    dead = [0, 13, BLOCK, 89]
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    used = damp(hessian, factorize(hessian, 0.05).ridge)
    codes = gptq_codes(core, codebook, used)
    assert torch.equal(codes[:, dead], find_nearest_codes(core[:, dead].contiguous(), codebook))
    assert torch.equal(descended(core, codebook, used, codes)[:, dead], codes[:, dead])
