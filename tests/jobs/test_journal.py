"""The journal of a job: what it takes up, what it refuses, and in which order things reach the disk."""

from __future__ import annotations

import json
import os
import shutil
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anequant.errors import InputError, UsageError
from anequant.jobs import journal as journal_module
from anequant.jobs.control import Progress, Run
from anequant.jobs.journal import Journal
from anequant.jobs.step import Step
from anequant.jobs.work_folder import WorkFolder

PRINT: dict[str, Any] = {"job": "quantize", "recipe": {"bits": 4, "scales": "output"}, "threads": 1}
DATA = [None, {"loss": 0.1 + 0.2, "tiny": 5e-324, "big": 2**70}, [1, "zwölf\n\u2028", None, True]]


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    made = WorkFolder(tmp_path / "out")
    made.folder.mkdir()
    return made


@dataclass(frozen=True)
class Five(Step[None, int]):
    stage = "count"
    kind = "five"
    result = int

    asked: list[int]

    @property
    def id(self) -> str:
        return "unit 0"

    def run(self, state: None, progress: Progress) -> int:
        self.asked.append(1)
        return 5


def never() -> Any:
    raise AssertionError("a unit that is done ran again")


def begun(work: WorkFolder) -> list[str]:
    """A journal of three units; its lines."""
    journal = Journal(work, PRINT, Run())
    for number, data in enumerate(DATA):
        assert journal.unit(f"unit {number}", partial(deepcopy, data), object) == data
    return work.journal.read_text().splitlines(keepends=True)


def test_units_that_are_done_are_not_done_again(work: WorkFolder) -> None:
    begun(work)
    journal = Journal(work, PRINT, Run())
    assert journal.units == ["unit 0", "unit 1", "unit 2"]
    assert journal.done("unit 2") and not journal.done("unit 3")
    assert [journal.unit(f"unit {number}", never, object) for number in range(3)] == DATA
    assert journal.unit("unit 3", lambda: 3, object) == 3
    assert Journal(work, PRINT, Run()).units == ["unit 0", "unit 1", "unit 2", "unit 3"]


def test_a_unit_yields_what_it_will_yield_later(work: WorkFolder) -> None:
    """Tuples become lists and keys become strings at once, not only after a crash."""
    journal = Journal(work, PRINT, Run())
    assert journal.unit("unit", lambda: {1: (2, 3)}, object) == {"1": [2, 3]}


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_last_line_without_its_end_is_dropped(work: WorkFolder, kept: float) -> None:
    lines = begun(work)
    whole = "".join(lines[:3])
    work.journal.write_text(whole + lines[3][: int(len(lines[3]) * kept)])
    journal = Journal(work, PRINT, Run())
    assert journal.units == ["unit 0", "unit 1"]
    assert work.journal.read_text() == whole
    assert [journal.unit("unit 0", never, object), journal.unit("unit 1", never, object)] == DATA[:2]
    assert journal.unit("unit 2", lambda: DATA[2], object) == DATA[2]
    assert work.journal.read_text() == "".join(lines)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_any_other_damage_is_refused(tmp_path: Path, place: float, mask: int) -> None:
    """One byte of a line that is not the last, whichever and however."""
    work = WorkFolder(tmp_path / "out")
    work.folder.mkdir(exist_ok=True)
    work.journal.unlink(missing_ok=True)
    lines = begun(work)
    data = bytearray("".join(lines).encode())
    data[int(place * len("".join(lines[:3]).encode()))] ^= mask
    work.journal.write_bytes(data)
    with pytest.raises((InputError, UsageError)) as error:
        Journal(work, PRINT, Run())
    assert "--no-resume" in error.value.remedy
    assert work.journal.read_bytes() == data


@pytest.mark.parametrize("change", [lambda lines: lines[:1] + lines[2:], lambda lines: lines[::-1]])
def test_lines_that_are_missing_or_exchanged_are_refused(work: WorkFolder, change: Any) -> None:
    work.journal.write_text("".join(change(begun(work))))
    with pytest.raises(InputError, match="damaged in line"):
        Journal(work, PRINT, Run())


def test_a_value_with_a_checksum_to_match_is_refused_in_the_line_after(work: WorkFolder) -> None:
    lines = begun(work)
    forged, _ = journal_module._make_line("unit 0", "other", json.loads(lines[0])["check"])
    work.journal.write_text(lines[0] + forged + "".join(lines[2:]))
    with pytest.raises(InputError, match="damaged in line 3"):
        Journal(work, PRINT, Run())


def test_another_unit_than_the_one_that_is_done_is_refused(work: WorkFolder) -> None:
    begun(work)
    with pytest.raises(InputError, match="'unit 0' where 'other' is due"):
        Journal(work, PRINT, Run()).unit("other", never, object)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"recipe": {"bits": 8, "scales": "output"}}, ("recipe.bits 4", "has 8")),
        ({"recipe": {"bits": 4}}, ("recipe.scales 'output'", "has None")),
        ({"job": "convert", "threads": 2}, ("job 'quantize'", "'convert' (and 1 more)")),
        ({"rotations": "abc"}, ("rotations None", "has 'abc'")),
    ],
)
def test_a_changed_job_is_refused_by_what_changed(
    work: WorkFolder, changed: dict[str, Any], words: tuple[str, ...]
) -> None:
    before = begun(work)
    with pytest.raises(UsageError) as error:
        Journal(work, {**PRINT, **changed}, Run())
    for word in words:
        assert word in error.value.what
    assert "--no-resume" in error.value.remedy
    assert work.journal.read_text() == "".join(before)


def test_without_resuming_the_folder_is_emptied(work: WorkFolder) -> None:
    begun(work)
    (work.output / "half.bin").write_bytes(b"half")
    journal = Journal(work, {**PRINT, "threads": 2}, Run(resume=False))
    assert journal.units == [] and list(work.output.iterdir()) == []
    assert journal.unit("unit 0", lambda: 7, object) == 7


def test_a_stop_is_raised_when_the_unit_is_on_record(work: WorkFolder) -> None:
    step = Five([])
    journal = Journal(work, PRINT, Run(stopping=lambda: bool(step.asked)))
    journal.plan([step])
    with pytest.raises(KeyboardInterrupt):
        journal.do(step, None)
    again = Journal(work, PRINT, Run())
    again.plan([step])
    assert again.do(step, None) == 5 and step.asked == [1]


def test_nothing_is_on_record_before_it_is_on_disk(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """File bytes, then folder names, then the line: seen by the fsync of each."""
    journal = Journal(work, PRINT, Run())
    synced: list[str] = []
    fsync = os.fsync

    def seen(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(work.folder).as_posix())
        fsync(handle)

    def write() -> None:
        (work.output / "deep").mkdir()
        (work.output / "deep" / "weights").write_bytes(b"1")

    monkeypatch.setattr(os, "fsync", seen)
    journal.unit("unit 0", write, object)
    assert synced == ["output/deep/weights", "output/deep", "output", ".", "journal.jsonl", "."]
    synced.clear()
    (work.output / "deep" / "weights").write_bytes(b"12")
    journal.unit("unit 1", lambda: None, object)
    assert synced[0] == "output/deep/weights" and synced[-2] == "journal.jsonl"
    synced.clear()
    journal.unit("unit 2", lambda: None, object)
    assert "output/deep/weights" not in synced


def test_a_worker_that_is_still_at_work_keeps_no_job_from_beginning(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes into the folder of tasks while that is being removed, which then is not empty."""
    late = Journal(work, PRINT, Run()).tasks / "late"
    late.write_bytes(b"a result")
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    journal = Journal(work, PRINT, Run())
    assert list(journal.tasks.iterdir()) == []
    assert journal.unit("unit 0", lambda: 1, int) == 1
