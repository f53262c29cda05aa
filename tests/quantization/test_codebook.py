from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anequant.quantization.codebook import (
    find_nearest_codes,
    find_uniform_step,
    lloyd_max,
    make_uniform_codebook,
)
from anequant.quantization.codebook_kernels import count_values

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)

Draw = Callable[[int, torch.Generator], Tensor]


def gaussian(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator)


def signs(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (n,), generator=generator) * 2.0 - 1


def laplace(n: int, generator: torch.Generator) -> Tensor:
    return torch.empty(n).exponential_(generator=generator) * signs(n, generator)


def uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) * 2 - 1


def two_humps(n: int, generator: torch.Generator) -> Tensor:
    return 0.3 * gaussian(n, generator) + signs(n, generator)


def skewed(n: int, generator: torch.Generator) -> Tensor:
    return gaussian(n, generator).mul(0.5).exp()


def heavy(n: int, generator: torch.Generator) -> Tensor:
    """Student's t with four degrees of freedom: what weights with outliers look like."""
    return gaussian(n, generator) / torch.randn(n, 4, generator=generator).square().mean(1).sqrt()


DRAWS: list[Draw] = [gaussian, laplace, uniform, two_humps, skewed, heavy]
each_draw = pytest.mark.parametrize("draw", DRAWS)
draws = st.sampled_from(DRAWS)


def sample(draw: Draw, n: int, seed: int = 4) -> Tensor:
    return draw(n, torch.Generator().manual_seed(seed))


def squared_error(values: Tensor, codebook: Tensor) -> float:
    """Mean squared distance to the nearest entry: the smaller of those to the neighbours, in float64."""
    entries, x = codebook.double().numpy(), values.double().numpy()
    above = np.searchsorted(entries, x).clip(1, len(entries) - 1)
    return float(np.minimum((x - entries[above - 1]) ** 2, (entries[above] - x) ** 2).mean())


def exact_squared_error(values: Tensor, entries: int, cells: int = 2000) -> float:
    """The least squared error of any codebook, by dynamic programming over the sorted values.

    With more values than cells, boundaries are limited to the edges of cells that hold equal counts or
    have equal widths; the result is then an upper bound of the optimum, close for smooth densities.
    """
    x = np.sort(values.double().numpy())
    n = len(x)
    edges = np.arange(n + 1)
    if n > cells:
        by_count = np.linspace(0, n, cells // 2 + 1).astype(int)
        by_width = np.searchsorted(x, np.linspace(x[0], x[-1], cells // 2 + 1))
        edges = np.unique(np.concatenate([by_count, by_width, [0, n]]))
    first, second = (np.concatenate([[0.0], np.cumsum(power)])[edges] for power in (x, x * x))
    count = (edges[None, :] - edges[:, None]).astype(float)
    spread = second[None, :] - second[:, None]
    squared_mean = (first[None, :] - first[:, None]) ** 2 / np.where(count > 0, count, 1.0)
    cost = np.where(count > 0, spread - squared_mean, np.where(count == 0, 0.0, np.inf))
    best = cost[0]
    for _ in range(entries - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[-1]) / n


def test_the_exact_reference_is_exact() -> None:
    values = torch.tensor([0.0, 0.1, 5.0, 5.1, 9.0])
    assert exact_squared_error(values, 3) == pytest.approx(2 * 2 * 0.05**2 / 5)
    assert exact_squared_error(values, 5) == pytest.approx(0.0, abs=1e-12)


# --- Lloyd-Max ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1175), (4, 0.009497)])
def test_a_gaussian_has_the_distortion_of_max_1960(bits: int, distortion: float) -> None:
    values = sample(gaussian, 1_000_000)
    assert squared_error(values, lloyd_max(values, bits)) == pytest.approx(distortion, rel=0.01)


def test_sixteen_levels_of_a_gaussian_are_off_by_about_9_77_percent() -> None:
    values = sample(gaussian, 500_000)
    relative = (squared_error(values, lloyd_max(values, 4)) / float(values.double().square().mean())) ** 0.5
    assert relative == pytest.approx(0.0977, rel=0.005)


def test_256_levels_of_a_gaussian_follow_panter_and_dite() -> None:
    """For many levels the least distortion tends to sqrt(3) pi / 2 / levels**2, from below."""
    values = sample(gaussian, 500_000)
    limit = 3**0.5 * np.pi / 2 / 256**2
    assert 0.95 * limit < squared_error(values, lloyd_max(values, 8)) < limit


@each_draw
@pytest.mark.parametrize("bits", [2, 4])
def test_within_half_a_percent_of_the_exact_optimum(draw: Draw, bits: int) -> None:
    values = sample(draw, 200_000)
    assert squared_error(values, lloyd_max(values, bits)) <= 1.005 * exact_squared_error(values, 2**bits)


@few
@given(draws, st.sampled_from([2, 4]), st.integers(300, 3000), seeds)
def test_entries_are_the_means_of_their_cells(draw: Draw, bits: int, n: int, seed: int) -> None:
    """Lloyd's condition, which every optimal codebook meets. Values within a histogram bin and a float16
    rounding of a boundary may belong to either side, so a mean is known up to where those go."""
    values = np.sort(sample(draw, n, seed).double().numpy())
    entries = lloyd_max(torch.from_numpy(values).float(), bits).double().numpy()
    boundaries = (entries[1:] + entries[:-1]) / 2
    bin_width = (values[-1] - values[0]) / 16384
    slack = 2 * bin_width + 2.0**-10 * np.abs(boundaries)
    ends = np.array([-np.inf]), np.array([np.inf])
    earliest = np.searchsorted(values, np.concatenate([ends[0], boundaries - slack, ends[1]]))
    latest = np.searchsorted(values, np.concatenate([ends[0], boundaries + slack, ends[1]]))
    for k, entry in enumerate(entries):
        low, high = values[earliest[k] : earliest[k + 1]], values[latest[k] : latest[k + 1]]
        if len(low) and len(high):
            tolerance = bin_width + 2.0**-10 * abs(entry) + 2.0**-10
            assert low.mean() - tolerance <= entry <= high.mean() + tolerance


@each_draw
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("n", [1500, 20_000])
def test_never_worse_than_uniform(draw: Draw, bits: int, n: int) -> None:
    values = sample(draw, n)
    grid = make_uniform_codebook(bits)
    largest = float(values.abs().max())
    steps = [find_uniform_step(values, bits), largest / (2 ** (bits - 1) - 1)]
    least = min(squared_error(values, grid * step) for step in steps)
    assert squared_error(values, lloyd_max(values, bits)) <= least


@each_draw
@pytest.mark.parametrize("n", [20_000, 200_000])
def test_more_bits_are_better(draw: Draw, n: int) -> None:
    values = sample(draw, n)
    errors = [squared_error(values, lloyd_max(values, bits)) for bits in (2, 4, 6, 8)]
    assert all(more < less / 4 for less, more in itertools.pairwise(errors))


@few
@given(draws, st.integers(1, 3000), st.sampled_from([2, 4, 6, 8]), seeds)
def test_entries_ascend_and_are_float16_numbers(draw: Draw, n: int, bits: int, seed: int) -> None:
    values = sample(draw, n, seed)
    codebook = lloyd_max(values, bits)
    assert codebook.dtype == torch.float32 and codebook.shape == (2**bits,)
    assert bool(torch.isfinite(codebook).all())
    assert bool((codebook.diff() > 0).all())
    assert torch.equal(codebook, codebook.half().float())


@few
@given(draws, st.sampled_from([4, 8]), seeds)
def test_entries_are_far_enough_apart_for_float16(draw: Draw, bits: int, seed: int) -> None:
    """A 256th of their size, as documented: float16's quotient of two roundings is off by a 1000th."""
    codebook = lloyd_max(sample(draw, 3000, seed), bits).double()
    gaps = codebook.diff()
    inner = torch.minimum(codebook[1:].abs(), codebook[:-1].abs())
    assert bool((gaps >= inner / 256).all())
    assert float(gaps.min()) >= 2.0**-10


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.37])
def test_equal_values_are_kept(bits: int, value: float) -> None:
    values = torch.full((100,), value)
    codebook = lloyd_max(values, bits)
    assert bool((codebook.diff() > 0).all())
    assert squared_error(values, codebook) <= (2**-11 * abs(value)) ** 2 + 1e-12


def test_values_that_fit_the_codebook_are_kept() -> None:
    levels = torch.linspace(-2, 2, 16)
    values = levels[torch.randint(16, (5000,), generator=torch.Generator().manual_seed(1))]
    codebook = lloyd_max(values, 4)
    torch.testing.assert_close(codebook, levels, rtol=0, atol=1e-3)


# --- the uniform codebook -----------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (6, -32, 31), (8, -128, 127)])
def test_uniform_is_the_signed_integers(bits: int, low: int, high: int) -> None:
    assert make_uniform_codebook(bits).tolist() == [float(k) for k in range(low, high + 1)]


@each_draw
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_best_step_is_the_best_of_a_dense_search(draw: Draw, bits: int) -> None:
    values = sample(draw, 20_000)
    grid = make_uniform_codebook(bits)
    steps = float(values.abs().max()) / 2 ** (bits - 1) * torch.linspace(0.05, 1.1, 100)
    least = min(squared_error(values, grid * float(step)) for step in steps)
    assert squared_error(values, grid * find_uniform_step(values, bits)) <= 1.05 * least


# --- nearest codes ------------------------------------------------------------------------------------


@few
@given(draws, st.sampled_from([2, 4, 8]), seeds)
def test_nearest_is_the_least_distance(draw: Draw, bits: int, seed: int) -> None:
    values = sample(draw, 35 * 31, seed).view(35, 31)
    codebook = lloyd_max(values, bits)
    codes = find_nearest_codes(values * 1.2, codebook)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape
    distances = (values.double()[..., None] * 1.2 - codebook.double()).abs()
    chosen = distances.gather(-1, codes[..., None].long())[..., 0]
    torch.testing.assert_close(chosen, distances.amin(-1), rtol=0, atol=1e-6)
    ties = (distances.sort(-1).values[..., :2].diff(dim=-1) < 1e-6)[..., 0]
    assert torch.equal(codes[~ties].long(), distances.argmin(-1)[~ties])


def test_values_beyond_the_ends_get_the_end() -> None:
    codebook = make_uniform_codebook(4)
    assert find_nearest_codes(torch.tensor([-1e30, -8.4, 7.4, 1e30]), codebook).tolist() == [0, 0, 15, 15]


@pytest.mark.parametrize("bins", [7, 16384])
def test_counts_are_those_of_torch(bins: int) -> None:
    values = torch.cat([sample(gaussian, 1000), torch.linspace(-5, 5, 129)])
    low, high = float(values.min()), float(values.max())
    expected = torch.histc(values, bins=bins, min=low, max=high).double()
    assert torch.equal(count_values(values, bins, low, high), expected) and expected.sum() == 1129


def test_the_number_of_threads_does_not_matter() -> None:
    values, codebook = sample(gaussian, 1000).view(10, 100), make_uniform_codebook(4) / 3
    whole, entries = find_nearest_codes(values, codebook), lloyd_max(values, 4)
    torch.set_num_threads(3)
    try:
        assert torch.equal(find_nearest_codes(values, codebook), whole)
        assert torch.equal(find_nearest_codes(values.T, codebook), whole.T)
        assert torch.equal(lloyd_max(values, 4), entries)
    finally:
        torch.set_num_threads(1)
