"""Means over windows: scipy's intervals, and how often they hold what they are an interval of."""

from __future__ import annotations

import numpy as np
import pytest
from check_coverage import Coverage, check_coverage
from scipy import stats

from anequant.evaluation.intervals import average, average_differences
from anequant.evaluation.quality import Quality, WindowMeans


@pytest.mark.parametrize("count", [2, 3, 32, 500])
def test_means_errors_and_intervals_are_scipys(count: int) -> None:
    values = np.random.default_rng(count).gamma(2.0, 0.1, count)
    found = average(values.tolist())
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.error == pytest.approx(stats.sem(values), rel=1e-12)
    assert found.interval == pytest.approx(
        stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values)), rel=1e-12
    )


@pytest.mark.parametrize("shift", [0.0, 0.002, 0.01, -0.01])
def test_differences_are_those_of_the_paired_test(shift: float) -> None:
    """0 is outside of the interval just where the test's p-value is below 5%."""
    draw = np.random.default_rng(3)
    ours = draw.gamma(4.0, 0.02, 32)
    theirs = ours - shift + draw.normal(0, 0.004, 32)
    found = average_differences(ours.tolist(), theirs.tolist())
    test = stats.ttest_rel(ours, theirs)
    assert found.value / (found.error or 0) == pytest.approx(test.statistic, rel=1e-9)
    interval = test.confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.excludes_zero == (test.pvalue < 0.05) == (abs(shift) > 0.001)


def test_one_window_shows_nothing() -> None:
    found = average([0.5])
    assert (found.value, found.error, found.interval, found.excludes_zero) == (0.5, None, None, False)


def test_equal_models_do_not_differ() -> None:
    found = average_differences([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (found.value, found.error, found.interval) == (0, 0, (0, 0)) and not found.excludes_zero


@pytest.mark.parametrize("windows", [8, 40])
def test_intervals_cover(windows: int) -> None:
    """Of windows drawn from many with a long tail, as KL has: 95 in 100 intervals hold the mean of all."""
    draw = np.random.default_rng(5)
    every = draw.lognormal(-3.0, 0.3, 1000)
    found = [average(draw.choice(every, windows, replace=False).tolist()).interval for _ in range(1000)]
    held = sum(ends is not None and ends[0] <= every.mean() <= ends[1] for ends in found)
    assert 925 <= held <= 975


def test_the_script_counts_the_intervals_that_hold() -> None:
    """Where all windows are alike each interval is one point and holds it; of KL some do not."""
    alike, draw = (0.5,) * 50, np.random.default_rng(1)
    values = tuple(draw.normal(0.2, 0.01, 50).tolist())
    quality = Quality(50, WindowMeans(alike, alike, values, alike))
    found = {one.name: one for one in check_coverage(quality, windows=10, times=40, seed=0)}
    assert found.keys() == {"KL", "extra NLL", "same top token", "NLL"}
    assert (found["NLL"].held, found["NLL"].figure, found["NLL"].suffices) == (40, 0.5, True)
    assert found["KL"].figure == pytest.approx(np.mean(values)) and 34 <= found["KL"].held < 40
    assert not Coverage("KL", 0.2, 16, 20).suffices and Coverage("KL", 0.2, 17, 20).suffices


def test_paired_intervals_are_narrower() -> None:
    """What makes a window hard for both models cancels; equal models are called different 5 times in 100."""
    draw = np.random.default_rng(6)
    errors = 0
    for _ in range(1000):
        hard = draw.lognormal(-3.0, 0.3, 32)
        ours, theirs = (hard + draw.normal(0, 0.002, 32) for _ in range(2))
        paired, alone = average_differences(ours.tolist(), theirs.tolist()), average(ours.tolist())
        assert paired.error is not None and alone.error is not None and paired.error < alone.error / 2
        errors += paired.excludes_zero
    assert 25 <= errors <= 75
