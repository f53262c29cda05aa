"""Several sources at once: their words, their shares, and windows that are those of each source alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files import contents
from hypothesis import given
from hypothesis import strategies as st
from running import invoke, succeed

from anequant.calibration import tokens
from anequant.calibration.shares import count_share, count_shares, make_calibration, mix_evenly, split_weight
from anequant.calibration.tokens import check_calibration, read_calibration_tokens, read_fresh_tokens
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.errors import UsageError
from anequant.recipe import Calibration

USAGE = UsageError.exit_code
WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


# --- words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "name", "weight"),
    [
        ("a.txt", "a.txt", 1.0),
        ("a.txt=2", "a.txt", 2.0),
        ("a.txt=.5", "a.txt", 0.5),
        ("self=1e-1", "self", 0.1),
        ("a=b.txt=3", "a=b.txt", 3.0),
        ("a.txt=", "a.txt=", 1.0),
        ("a.txt=two", "a.txt=two", 1.0),
        ("a.txt=nan", "a.txt=nan", 1.0),
        ("c:/a.txt=2", "c:/a.txt", 2.0),
        ("=2", "=2", 1.0),
        ("there=2", "there=2", 1.0),
        ("there=2=3", "there=2", 3.0),
        (Path("gone=2"), "gone=2", 1.0),
    ],
)
def test_a_weight_follows_a_name_that_is_no_file_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str | Path, name: str, weight: float
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there=2").write_text("a file")
    assert split_weight(word) == (name, weight)


def test_words_are_one_source_or_several() -> None:
    assert make_calibration("a", 2, 3, 4, chat=True) == Calibration(("a",), 2, 3, 4, (), True)
    assert make_calibration(Path("a"), 2, 3, 4, chat=False) == Calibration(("a",), 2, 3, 4)
    several = make_calibration(["self", Path("a"), "b=2"], 9, 3, 4, chat=False)
    assert several == Calibration(("self", "a", "b"), 9, 3, 4, (1.0, 1.0, 2.0))
    assert make_calibration(["a", "b=1"], 9, 3, 4, chat=False).weights == ()


@pytest.mark.parametrize(
    ("words", "samples", "message"),
    [
        (["a.txt", "./a.txt"], 9, r"'\./a\.txt' is named twice"),
        (["link.txt=2", "a.txt"], 9, r"'a\.txt' is named twice"),
        (["self", "self=2"], 9, "'self' is named twice"),
        (["a.txt=0"], 9, r"weight of calibration source 'a\.txt' is 0"),
        (["a.txt", "b.txt=-1"], 9, r"weight of calibration source 'b\.txt' is -1"),
        (["a.txt", "b.txt=1e999"], 9, r"weight of calibration source 'b\.txt' is inf"),
        (["a.txt", "b.txt", "self"], 2, "3 calibration sources take a window each, and samples is 2"),
        ([], 9, "no calibration source"),
    ],
)
def test_words_that_make_no_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], samples: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    Path("link.txt").symlink_to("a.txt")
    with pytest.raises(UsageError, match=message) as caught:
        make_calibration(words, samples, 16, 0, chat=False)
    assert caught.value.remedy


# --- shares -------------------------------------------------------------------------------------------


def shares(weights: list[float], samples: int) -> tuple[int, ...]:
    names = tuple(f"{number}.txt" for number in range(len(weights)))
    return count_shares(Calibration(names, samples, weights=tuple(weights)))


@given(WEIGHTS, st.integers(0, 200))
def test_shares_are_the_weights_as_near_as_whole_windows_are(weights: list[float], more: int) -> None:
    samples = len(weights) + more
    counts = shares(weights, samples)
    exact = [samples * weight / sum(weights) for weight in weights]
    assert sum(counts) == samples and min(counts) >= 1
    if min(exact) >= 1:
        assert all(abs(count - share) < 1 + 1e-9 for count, share in zip(counts, exact, strict=True))
    for (one, few), (other, many) in itertools.combinations(zip(weights, counts, strict=True), 2):
        assert one == other or (few <= many) == (one < other) or few == many


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [3.0, 1.0], [1.0, 2.0, 4.0], [0.2, 0.7, 0.1]])
@pytest.mark.parametrize("samples", [3, 4, 7, 12])
def test_no_other_shares_are_nearer(weights: list[float], samples: int) -> None:
    """Largest remainders have the least sum of squares; by brute force over all ways to share."""
    exact = [samples * weight / sum(weights) for weight in weights]

    def far(counts: tuple[int, ...]) -> float:
        return sum((count - share) ** 2 for count, share in zip(counts, exact, strict=True))

    every = itertools.product(range(1, samples + 1), repeat=len(weights))
    least = min(far(counts) for counts in every if sum(counts) == samples)
    assert math.isclose(far(shares(weights, samples)), least, abs_tol=1e-9)


def test_a_share_is_that_of_its_source() -> None:
    calibration = Calibration(("self", "a", "b"), 8, weights=(2.0, 1.0, 1.0))
    assert [count_share(calibration, name) for name in ("self", "a", "b", "c")] == [4, 2, 2, 0]
    assert count_shares(Calibration(("a", "b"), 5)) == (3, 2)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.data())
def test_every_stretch_has_its_part_of_every_source(counts: list[int], data: st.DataObject) -> None:
    """So what is held out, at the beginning or the end, is like the rest; each source stays in order."""
    order = mix_evenly(counts)
    assert sorted(order) == [(source, window) for source, n in enumerate(counts) for window in range(n)]
    cut = data.draw(st.integers(0, len(order)))
    for source, count in enumerate(counts):
        seen = [window for other, window in order if other == source]
        assert seen == list(range(count))
        before = sum(other == source for other, _ in order[:cut])
        assert abs(before - cut * count / len(order)) <= len(counts) / 2 + 1e-9


# --- windows ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_qwen2: Path) -> Checkpoint:
    return open_checkpoint(tiny_qwen2)


@pytest.fixture
def three(tmp_path: Path) -> tuple[str, ...]:
    """The model itself, a text, and rows of ids."""
    text, ids = tmp_path / "text.txt", tmp_path / "ids.json"
    text.write_text(SAMPLE_TEXT.read_text()[:3000])
    ids.write_text(json.dumps([[row, *range(16)] for row in range(10)]))
    return "self", str(text), str(ids)


def test_windows_are_those_of_each_source_alone(tiny: Checkpoint, three: tuple[str, ...]) -> None:
    calibration = Calibration(three, 9, 16, 5, (2.0, 4.0, 3.0))
    check_calibration(calibration, tiny)
    mixed = read_calibration_tokens(calibration, tiny)
    expected: list[tuple[float, int, list[int]]] = []
    for number, (source, count) in enumerate(zip(three, (2, 4, 3), strict=True)):
        alone = read_calibration_tokens(Calibration((source,), count, 16, 5), tiny).tolist()
        assert len(alone) == count
        expected += [((window + 0.5) / count, number, ids) for window, ids in enumerate(alone)]
    assert mixed.tolist() == [ids for _, _, ids in sorted(expected)]


def test_the_order_of_sources_gives_their_windows_in_another_order(
    tiny: Checkpoint, three: tuple[str, ...]
) -> None:
    one, other = (
        read_calibration_tokens(Calibration(names, 6, 16), tiny) for names in (three, (*three[1:], three[0]))
    )
    assert sorted(one.tolist()) == sorted(other.tolist()) and not torch.equal(one, other)


def test_a_share_that_a_source_does_not_hold(tiny: Checkpoint, three: tuple[str, ...]) -> None:
    """Alone it gives what it has; beside others that would be another mixture than was asked for."""
    assert len(read_calibration_tokens(Calibration((three[2],), 12, 16), tiny)) == 10
    for read in (check_calibration, read_calibration_tokens):
        with pytest.raises(
            UsageError, match=r"ids\.json' has 10 windows of 16 tokens, its share is 12"
        ) as caught:
            read(Calibration(three[1:], 24, 16), tiny)
        assert "--calib-samples" in caught.value.remedy


def test_fresh_windows_are_of_another_seed_and_what_sources_hold(
    tiny: Checkpoint, three: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share that is not there is no error here; of what the model writes there is a limit."""
    monkeypatch.setattr(tokens, "MOST_WRITTEN", 2)
    calibration = Calibration(three, 9, 16, 5)
    fresh = read_fresh_tokens(calibration, tiny, 36)
    alone = [
        read_calibration_tokens(Calibration((source,), count, 16, 6), tiny).tolist()
        for source, count in zip(three, (2, 12, 12), strict=True)
    ]
    assert [len(windows) for windows in alone] == [2, 12, 10]
    assert sorted(fresh.tolist()) == sorted(ids for windows in alone for ids in windows)
    assert len(read_fresh_tokens(calibration, tiny, 1)) == 3


# --- the whole way ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("shares") / "model", "llama", False, num_hidden_layers=1)


QUICK = ("--calib-length", 8, "--descent", 0, "--refinement", 0)


def quantize_words(model: Path, output: Path, *options: Any) -> list[Any]:
    return ["quantize", model, "-o", output, *QUICK, *options]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two files of rows."""
    monkeypatch.chdir(tmp_path)
    for name, first in (("a.json", 3), ("b.json", 40)):
        Path(name).write_text(json.dumps([[5, *range(first + row, first + row + 8)] for row in range(12)]))
    return tmp_path


def test_the_manifest_says_what_came_from_where(model: Path, place: Path) -> None:
    sources = ("--calib", "a.json=3", "--calib", place / "b.json", "--calib", "self", "--calib-samples", 10)
    succeed(*quantize_words(model, Path("out"), *sources))
    recorded = json.loads(Path("out/anequant.json").read_text())["calibration"]
    assert recorded["source"] == "a.json, b.json, self"
    assert recorded["sources"] == [
        {"name": "a.json", "weight": 3, "windows": 6},
        {"name": "b.json", "weight": 1, "windows": 2},
        {"name": "self", "weight": 1, "windows": 2},
    ]
    assert (recorded["windows"], recorded["samples"], recorded["chat"]) == (10, 10, False)
    card = Path("out/README.md").read_text()
    assert "--calib a.json=3 --calib b.json=1 --calib self=1 --calib-samples 10" in card
    assert "a.json, b.json, self, 10 windows of 8 tokens" in card and str(place) not in card


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--calib", "a.json", "--calib", "./a.json"), ("'./a.json' is named twice",)),
        (("--calib", "a.json=0"), ("weight of calibration source 'a.json' is 0",)),
        (("--calib", "a.json=-2", "--calib", "self"), ("weight of calibration source 'a.json' is -2",)),
        (("--calib", "a.json", "--calib", "gone.txt"), ("'gone.txt' does not exist",)),
        (("--calib", "a.json", "--calib", "gone.txt=2"), ("'gone.txt' does not exist",)),
        (("--calib", "self", "--calib", "."), ("'.' is a folder",)),
        (
            ("--calib", "self", "--calib", "a.json", "--calib-samples", 1),
            ("2 calibration sources take a window each",),
        ),
        (("--calib", "self", "--calib", "a.json", "--calib-samples", 40), ("its share is 20",)),
    ],
)
def test_sources_that_are_refused_leave_nothing(
    model: Path, place: Path, options: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    before = contents(place)
    result = invoke(*quantize_words(model, Path("out"), *options))
    lines = result.stderr.splitlines()
    assert result.exit_code == USAGE and lines[0].startswith("error: "), result.stderr
    assert all(word in lines[0] for word in words), lines
    assert contents(place) == before
