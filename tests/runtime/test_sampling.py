"""Sampling against its definitions, written out."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from anequant.errors import UsageError
from anequant.runtime.sampling import Sampling, compute_chances, make_chooser


def logits(seed: int = 0, count: int = 50) -> Tensor:
    return 3 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


@given(st.floats(0.1, 3), st.integers(0, 60), st.floats(0.05, 1), st.integers(0, 1000))
def test_probabilities_are_those_of_transformers(
    temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    values = logits(seed)[None]
    expected = TemperatureLogitsWarper(temperature)(None, values)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = compute_chances(values[0], Sampling(temperature, top_k, top_p))
    torch.testing.assert_close(ours, expected[0].softmax(-1), rtol=1e-4, atol=1e-6)


def test_temperature_zero_takes_the_best() -> None:
    choose = make_chooser(Sampling())
    assert all(choose(logits(seed)) == int(logits(seed).argmax()) for seed in range(20))


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    values, sampling = logits(count=8), Sampling(1.0, 5, 0.95, seed=3)
    choose, again = make_chooser(sampling), make_chooser(sampling)
    drawn = [choose(values) for _ in range(4000)]
    assert drawn[:200] == [again(values) for _ in range(200)]
    other = make_chooser(Sampling(1.0, 5, 0.95, seed=4))
    assert drawn[:50] != [other(values) for _ in range(50)]
    shares = torch.tensor(drawn).bincount(minlength=8) / 4000
    assert float((shares - compute_chances(values, sampling)).abs().max()) < 0.03


@pytest.mark.parametrize(
    "values", [(-0.1, 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0), (1.0, 0, 1.5), (nan, 0, 1.0), (inf, 0, 1.0)]
)
def test_impossible_values_are_refused(values: tuple[float, int, float]) -> None:
    with pytest.raises(UsageError, match="temperature"):
        Sampling(*values)


@pytest.mark.parametrize("temperature", [1e-6, 1e-45, 1e-300])
def test_a_temperature_of_nearly_nothing_takes_the_best(temperature: float) -> None:
    values = logits()
    expected = torch.nn.functional.one_hot(values.argmax(), len(values)).float()
    assert torch.equal(compute_chances(values, Sampling(temperature)), expected)
