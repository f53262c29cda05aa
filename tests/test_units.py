"""Sizes and times as people read and write them."""

from __future__ import annotations

import pytest

from anequant.units import format_bytes, format_duration, format_estimate, parse_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),
        (45_600_000, "45.6 MB"),
        (999_900_000, "1 GB"),
        (1_234e9, "1,234 GB"),
    ],
)
def test_a_size_has_three_digits_and_the_largest_unit_that_fits(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), (" 1.5 kb ", 1500), ("2g", 2 * 10**9), ("17", 17)],
)
def test_a_size_is_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "error"), [("four", ValueError), ("-1", ValueError), ("9" * 400, OverflowError)]
)
def test_what_is_no_size(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("seconds", "measured", "expected"),
    [
        (1.23, "1.2 s", "1.2 s"),
        (200, "3 min 20 s", "3 min"),
        (3900, "1 h 5 min", "1 h 05 min"),
    ],
)
def test_what_was_measured_is_told_closer_than_what_is_expected(
    seconds: float, measured: str, expected: str
) -> None:
    assert format_duration(seconds) == measured
    assert format_estimate(seconds) == expected
