"""allocate_bits against every possible assignment."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anequant.errors import UsageError
from anequant.quantization.bit_allocation import allocate_bits

WIDTHS = (4, 6, 8)


def convex_losses(values: list[tuple[int, int]]) -> dict[str, dict[int, float]]:
    """Losses at 8, 6 and 4 bits; every step up saves less than the one before."""
    return {
        f"t{number}": {8: 0, 6: small, 4: small + small + extra}
        for number, (small, extra) in enumerate(values)
    }


def total(losses: Mapping[str, Mapping[int, float]], chosen: Mapping[str, int]) -> float:
    return sum(losses[name][bits] for name, bits in chosen.items())


def best_total(losses: Mapping[str, Mapping[int, float]], average: float) -> float:
    """The least loss of all assignments within the average, all tensors of one size."""
    names = list(losses)
    assignments = itertools.product(WIDTHS, repeat=len(names))
    within = [widths for widths in assignments if sum(widths) <= average * len(names) + 1e-9]
    return min(total(losses, dict(zip(names, widths, strict=True))) for widths in within)


sizes_of_losses = st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 1000)), min_size=1, max_size=5)


@given(sizes_of_losses, st.integers(0, 10))
def test_convex_losses_get_the_best_assignment(values: list[tuple[int, int]], steps: int) -> None:
    losses = convex_losses(values)
    average = min(8.0, 4 + 2 * min(steps, 2 * len(losses)) / len(losses))
    chosen = allocate_bits(losses, dict.fromkeys(losses, 100), average)
    assert sum(chosen.values()) <= average * len(losses) + 1e-9
    assert total(losses, chosen) == pytest.approx(best_total(losses, average), rel=1e-6)


@given(sizes_of_losses, st.lists(st.floats(4, 8), min_size=2, max_size=4))
def test_a_larger_average_never_loses_more(values: list[tuple[int, int]], averages: list[float]) -> None:
    losses = convex_losses(values)
    sizes = dict.fromkeys(losses, 100)
    totals = [total(losses, allocate_bits(losses, sizes, average)) for average in sorted(averages)]
    assert totals == sorted(totals, reverse=True)


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.integers(1, 1000), min_size=6, max_size=6),
    st.floats(4, 8),
)
def test_any_losses_and_sizes_stay_within_the_budget(
    values: list[list[float]], sizes: list[int], average: float
) -> None:
    losses = {f"t{i}": dict(zip(WIDTHS, row, strict=True)) for i, row in enumerate(values)}
    numbers = {name: sizes[i] for i, name in enumerate(losses)}
    chosen = allocate_bits(losses, numbers, average)
    assert set(chosen) == set(losses) and set(chosen.values()) <= set(WIDTHS)
    spent = sum(numbers[name] * bits for name, bits in chosen.items())
    assert spent <= average * sum(numbers.values()) * (1 + 1e-12)
    assert all(losses[name][bits] <= losses[name][4] for name, bits in chosen.items())


def test_the_most_sensitive_tensor_comes_first() -> None:
    losses = {"calm": {4: 1.0, 8: 0.0}, "tender": {4: 9.0, 8: 0.0}, "big": {4: 12.0, 8: 0.0}}
    sizes = {"calm": 100, "tender": 100, "big": 1000}
    assert allocate_bits(losses, sizes, 4.4) == {"calm": 4, "tender": 8, "big": 4}


def test_what_counts_is_the_loss_saved_per_bit() -> None:
    losses = {name: {4: 5.0, 8: 0.0} for name in "abc"} | {"big": {4: 12.0, 8: 0.0}}
    sizes = {"a": 100, "b": 100, "c": 100, "big": 300}
    assert allocate_bits(losses, sizes, 6.0) == {"a": 8, "b": 8, "c": 8, "big": 4}


def test_no_step_is_taken_whose_first_part_did_not_fit() -> None:
    assert allocate_bits({"a": {2: 9.0, 6: 1.0, 8: 0.0}}, {"a": 1}, 5.0) == {"a": 2}


def test_a_middle_width_that_helps_little_is_passed_over() -> None:
    losses = {"a": {4: 10.0, 6: 9.9, 8: 0.0}, "b": {4: 5.0, 6: 1.0, 8: 0.9}}
    assert allocate_bits(losses, {"a": 1, "b": 1}, 7.0) == {"a": 8, "b": 6}


def test_a_wider_width_that_is_no_better_is_not_taken() -> None:
    losses = {"a": {4: 1.0, 8: 1.0}, "b": {4: 1.0, 8: 1.5}}
    assert allocate_bits(losses, {"a": 1, "b": 1}, 8.0) == {"a": 4, "b": 4}


@pytest.mark.parametrize("average", [3.9, 8.1, 0.5])
def test_an_average_outside_the_widths_is_refused(average: float) -> None:
    with pytest.raises(UsageError, match="cannot be met by widths of 4, 8") as caught:
        allocate_bits({"a": {4: 1.0, 8: 0.0}}, {"a": 1}, average)
    assert "from 4 to 8" in caught.value.remedy
