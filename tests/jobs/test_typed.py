"""What a journal keeps of results: the same values, of the same types, as before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anequant.calibration.rotation_choice import RotationChoice
from anequant.jobs.typed import from_plain, to_plain
from anequant.pipeline.rounder import TensorError
from anequant.pipeline.rounding_pass import RoundedPart
from anequant.targets.shared.finding import Finding

NUMBERS = st.floats(allow_nan=False)
ERRORS = st.builds(
    TensorError,
    st.text(),
    st.integers(),
    st.integers(),
    NUMBERS,
    st.none() | NUMBERS,
    st.none() | st.integers(),
)
PARTS = st.builds(
    RoundedPart,
    *(st.integers(), st.integers(), st.integers()),
    st.lists(ERRORS).map(tuple),
    st.dictionaries(st.text(), NUMBERS),
    st.none() | NUMBERS,
)


@given(PARTS)
def test_a_result_comes_back_as_it_was(part: RoundedPart) -> None:
    plain = to_plain(part)
    assert json.loads(json.dumps(plain)) == plain == json.loads(json.dumps(dataclasses.asdict(part)))
    assert from_plain(RoundedPart, plain) == part


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (tuple[int, int], (3, 16)),
        (Mapping[str, int], {"a": 4}),
        (tuple[Finding, ...], (Finding(*"abcdefgh"),)),
        (RotationChoice, RotationChoice(3, {3: 0.5, 4: 0.25}, None)),
        (dict, {"a": [1, None, "b"]}),
        (type(None), None),
    ],
)
def test_types_that_steps_return(kind: Any, value: Any) -> None:
    assert from_plain(kind, to_plain(value)) == value


def test_what_is_no_plain_value_is_refused() -> None:
    with pytest.raises(TypeError, match="object is no plain value"):
        to_plain({"a": object()})
