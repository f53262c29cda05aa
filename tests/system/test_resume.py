"""Jobs that are killed, interrupted or out of disk, and go on: to the bytes of an uninterrupted run, or not
at all (design.md, guarantee 5)."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files import contents
from running import Ran, execute, invoke

from anequant import request as request_module
from anequant.checkpoints.writer import CheckpointWriter
from anequant.jobs import journal as journal_module
from anequant.jobs.work_folder import WorkFolder
from anequant.versions import installed_versions

pytestmark = pytest.mark.usefixtures("no_progress")

KILLING = Path(__file__).with_name("killing.py")
SUCCESS, USAGE, INPUT, RESOURCE, INTERRUPTED = 0, 2, 3, 5, 130
QUICK_GPTQ = {"codebook": "uniform", "correction": 0.0, "descent": 0, "refinement": 0}
NEVER = 1000
MATRICES = {
    "convert": {"job": "convert", "recipe": "w4-nearest", "keys": {}, "every": 1},
    "calibration": {"job": "quantize", "recipe": "w4-ane", "keys": QUICK_GPTQ, "every": 3},
    "every step": {
        "job": "quantize",
        "recipe": "w4-ane",
        "keys": {
            **QUICK_GPTQ,
            "descent": 1,
            "restarts": 2,
            "learn": 1,
            "target_bits": 5.0,
            "tune": 1,
            "embedding_bits": 8,
            "head_bits": 8,
        },
        "every": NEVER,
    },
    "static activations": {
        "job": "quantize",
        "recipe": "w8a8-ane",
        "keys": {**QUICK_GPTQ, "rounding": "gptq", "smooth": 0.5},
        "every": NEVER,
    },
}
"""Every kill of `every` is followed by a run to the end; all are survived by the one process after the other
that does a unit each."""


@pytest.fixture(scope="module", params=MATRICES)
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killed")
    words = (sys.executable, KILLING, folder, json.dumps(MATRICES[request.param]))
    ran = execute(*words, env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    assert ran.exit_code == 0, ran.stderr
    shutil.rmtree(folder)
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return {**result, **MATRICES[request.param], "stderr": ran.stderr}


def test_a_killed_run_goes_on_to_the_same_bytes(matrix: dict[str, Any]) -> None:
    units, kills = matrix["units"], matrix["kills"]
    every = range(matrix["every"], len(units) + 1, matrix["every"])
    expected = {f"after {units[number - 1]}" for number in every} | {f"after {units[-1]}"}
    if matrix["every"] == 1:
        expected |= {"in layer 3 of 4", "in checkpoint files", "in report", "in publish"}
        expected |= {"in chunk 1 of 2"}
    assert kills.keys() == expected
    for place, end in kills.items():
        assert end is not None, (place, matrix["stderr"])
        assert end["signal"] == signal.SIGKILL, place
        assert end["left by the kill"] == [".out.partial"], place
        assert (end["left"], end["differs"]) == (["out"], []), place


def test_a_run_that_goes_on_says_so(matrix: dict[str, Any]) -> None:
    units = matrix["units"]
    for number, name in enumerate(units[1:], 1):
        if f"after {name}" in matrix["kills"]:
            [note] = matrix["kills"][f"after {name}"]["notes"]
            done = f"{number} unit{'s are' if number > 1 else ' is'} done"
            assert note.startswith("resuming '") and note.endswith(f"out': {done}, the last is '{name}'")


def test_all_kinds_of_units_are_killed(matrix: dict[str, Any]) -> None:
    units = matrix["units"]
    assert units[0] == "fingerprint" and len(set(units)) == len(units)
    assert {"embedding", "layer 1 of 4", "layer 4 of 4", "head", "checkpoint files"} <= set(units)
    if matrix["job"] == "convert":
        assert {
            "ranges",
            "verify checkpoint",
            "verify packages",
            "lint",
            "quality",
            "conversion files",
            "report",
        } <= set(units)
        assert sum("chunk" in name for name in units) == 2
    if matrix["keys"].get("tune"):
        assert {"calibration tokens", "rotations", "bits", "tuning"} <= set(units)


# In this process: a model of three layers


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("resume") / "model", "llama", False)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert quantize(model, folder).exit_code == SUCCESS
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home" / "out"


def quantize(model: Path, out: Path, *options: str) -> Ran:
    words = ["quantize", str(model), "-o", str(out), "--recipe", "w4-nearest", *options]
    return invoke(*words)


def rotate(model: Path, out: Path) -> Ran:
    tokens = ("--calib-samples", "2", "--calib-length", "8")
    return invoke("rotate", model, "-o", out, "--r1", "pca", *tokens)


def refused(result: Ran, code: int, *words: str) -> None:
    lines = [line for line in result.stderr.splitlines() if not line.startswith("resuming '")]
    assert (result.exit_code, lines[0][:7]) == (code, "error: "), result.stderr
    for word in words:
        assert any(word in line for line in lines), (word, lines)


def stopped_at(out: Path, unit: str, model: Path, *options: str, run: Any = quantize) -> Ran:
    """A run that Ctrl-C stops in that unit."""
    append = journal_module.append_line

    def press(path: Path, line: str) -> None:
        append(path, line)
        if json.loads(line)["unit"] == unit:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "append_line", press)
        result: Ran = run(model, out, *options)
    assert result.exit_code == INTERRUPTED, result.stderr
    return result


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_ctrl_c_ends_the_unit_and_tells_how_to_go_on(
    model: Path, whole: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quantize", str(model), "-o", "a folder/out", "--no-resume"]
    monkeypatch.setattr(sys, "argv", ["anequant", *words])
    result = stopped_at(out, "layer 2 of 3", model, "--no-resume")
    assert result.stdout == ""
    first, kept, last = result.stderr.splitlines()
    assert "press Ctrl-C again" in first
    partial = out.parent / ".out.partial"
    assert kept == f"interrupted; kept in '{partial}': 3 units are done, the last is 'layer 2 of 3'"
    assert shlex.split(last.removeprefix("to go on: ")) == ["anequant", *words[:-1]]
    assert names(out.parent) == {".out.partial"}
    done = json.loads(WorkFolder(out).journal.read_text().splitlines()[-1])
    assert done["unit"] == "layer 2 of 3"
    result = quantize(model, out)
    assert result.exit_code == SUCCESS
    assert result.stderr == f"resuming '{out}': 3 units are done, the last is 'layer 2 of 3'\n"
    assert names(out.parent) == {"out"} and contents(whole) == contents(out)


def test_a_second_ctrl_c_stops_at_once(
    model: Path, whole: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CheckpointWriter.write

    def press_twice(self: CheckpointWriter, name: str, values: Any) -> None:
        if name == "model.layers.1.mlp.up_proj.weight":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("still running")
        write(self, name, values)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", press_twice)
        result = quantize(model, out)
    assert result.exit_code == INTERRUPTED and "to go on: anequant" in result.stderr
    assert quantize(model, out).exit_code == SUCCESS
    assert contents(whole) == contents(out)


def test_ctrl_c_before_anything_is_done_leaves_nothing(model: Path, out: Path) -> None:
    result = stopped_at(out, "fingerprint", model)
    assert result.stderr.splitlines()[-1] == "interrupted; no output was left behind"
    assert names(out.parent) == set()


def test_no_resume_starts_over(model: Path, whole: Path, out: Path) -> None:
    stopped_at(out, "layer 2 of 3", model)
    result = quantize(model, out, "--no-resume")
    assert (result.exit_code, result.stderr) == (SUCCESS, "")
    assert names(out.parent) == {"out"} and contents(whole) == contents(out)


def test_another_recipe_is_refused(model: Path, whole: Path, out: Path) -> None:
    stopped_at(out, "layer 2 of 3", model)
    result = quantize(model, out, "--bits", "8", "--seed", "3")
    refused(result, USAGE, "recipe.seed 0, this one has 3 (and 1 more)", "--no-resume")
    assert quantize(model, out).exit_code == SUCCESS
    assert contents(whole) == contents(out)


def test_another_source_is_refused(model: Path, out: Path, tmp_path: Path) -> None:
    """The same sizes and values, written later."""
    copy = shutil.copytree(model, tmp_path / "model")
    stopped_at(out, "layer 2 of 3", copy)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    refused(quantize(copy, out), USAGE, "source.model.safetensors", "--no-resume")


def test_another_version_is_refused(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(out, "layer 2 of 3", model)
    versions = installed_versions()
    monkeypatch.setattr(request_module, "installed_versions", lambda: {**versions, "torch": "9.9"})
    refused(quantize(model, out), USAGE, "versions.torch", "has '9.9'")


def test_another_number_of_threads_is_refused(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(out, "layer 2 of 3", model)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    refused(quantize(model, out), USAGE, "threads", "has 99")


def test_a_damaged_journal_is_refused(model: Path, whole: Path, out: Path) -> None:
    stopped_at(out, "layer 2 of 3", model)
    journal = WorkFolder(out).journal
    text = journal.read_text()
    journal.write_text(text.replace('"unit": "layer 1 of 3"', '"unit": "layer 1 of 4"'))
    refused(quantize(model, out), INPUT, "is damaged in line 3", "--no-resume")
    journal.write_text(text)
    assert quantize(model, out).exit_code == SUCCESS
    assert contents(whole) == contents(out)


def test_weights_that_are_cut_off_are_refused(model: Path, whole: Path, out: Path) -> None:
    stopped_at(out, "layer 2 of 3", model)
    shard = WorkFolder(out).output / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    for _ in range(2):
        refused(quantize(model, out), INPUT, "'model.safetensors' of an interrupted run is cut off")
    assert quantize(model, out, "--no-resume").exit_code == SUCCESS
    assert contents(whole) == contents(out)


def calibrated(model: Path, out: Path) -> Ran:
    tokens = ("--calib", "self", "--calib-samples", "2", "--calib-length", "8")
    return invoke("quantize", model, "-o", out, *tokens)


@pytest.mark.parametrize("file", ["token_weights.safetensors", "couplings-2.safetensors"])
def test_what_the_end_loss_said_is_kept_until_all_layers_are_rounded(
    model: Path, out: Path, file: str
) -> None:
    whole = out.with_name("whole")
    assert calibrated(model, whole).exit_code == SUCCESS
    stopped_at(out, "layer 2 of 3", model, run=calibrated)
    kept = WorkFolder(out).folder / file
    content = kept.read_bytes()
    kept.write_bytes(content[:-1])
    for _ in range(2):
        refused(calibrated(model, out), INPUT, f"'{file}' of an interrupted run is damaged", "--no-resume")
    kept.write_bytes(content)
    stopped_at(out, "head", model, run=calibrated)
    assert not kept.name.startswith("couplings") or not kept.exists()
    assert calibrated(model, out).exit_code == SUCCESS and contents(whole) == contents(out)


@pytest.mark.parametrize("unit", ["rotations", "layer 2 of 3", "checkpoint files"])
def test_rotations_are_found_once(model: Path, out: Path, unit: str) -> None:
    whole = out.with_name("whole")
    assert rotate(model, whole).exit_code == SUCCESS
    stopped_at(out, unit, model, run=rotate)
    result = rotate(model, out)
    assert result.exit_code == SUCCESS and f"the last is '{unit}'" in result.stderr
    assert (whole / "rotations.safetensors").is_file() and contents(whole) == contents(out)


def test_any_other_calibration_file_is_refused(model: Path, out: Path, tmp_path: Path) -> None:
    """Of several sources every file counts, and its weight; the same ones resume to the same bytes."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for file, first in ((one, 3), (two, 40)):
        file.write_text(json.dumps([[5, *range(first, first + 7)], [5, *range(first + 7, first + 14)]]))

    def mix(model: Path, out: Path, weight: str = "=3") -> Ran:
        sources = ("--calib", one, "--calib", f"{two}{weight}", "--calib", "self")
        sizes = ("--calib-samples", 4, "--calib-length", 8)
        return invoke("rotate", model, "-o", out, "--r1", "pca", *sources, *sizes)

    whole = out.with_name("whole")
    assert mix(model, whole).exit_code == SUCCESS
    stopped_at(out, "calibration tokens", model, run=mix)
    kept = two.read_text()
    two.write_text(kept.replace("40", "41"))
    refused(mix(model, out), USAGE, "calibration files")
    two.write_text(kept)
    refused(mix(model, out, "=2"), USAGE, "calibration.weights [1.0, 3.0, 1.0]", "has [1.0, 2.0, 1.0]")
    assert mix(model, out).exit_code == SUCCESS and contents(whole) == contents(out)


def test_a_kill_when_the_output_has_its_name(
    model: Path, whole: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command says that all is done; any other finds an output that exists."""
    journals = []
    publish = WorkFolder.publish

    def kept(self: WorkFolder) -> None:
        journals.append(self.journal.read_bytes())
        publish(self)

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "publish", kept)
        assert quantize(model, out).exit_code == SUCCESS
    work = WorkFolder(out)
    for options in (("--bits", "8"), ("--no-resume",), ()):
        work.folder.mkdir()
        work.journal.write_bytes(journals[0])
        result = quantize(model, out, *options)
        if options:
            refused(result, USAGE, "out' exists", "--force")
        else:
            assert result.exit_code == SUCCESS and "the last is 'checkpoint files'" in result.stderr
        assert names(out.parent) == {"out"} and contents(whole) == contents(out)


def test_two_runs_on_one_target(model: Path, out: Path) -> None:
    """The second one, started while the first one works, is refused; the first one ends well."""
    append = journal_module.append_line
    begun: list[str] = []
    seen: list[Ran] = []

    def meet(path: Path, line: str) -> None:
        append(path, line)
        begun.append(line)
        if len(begun) == 1:
            seen.append(quantize(model, out, "--force"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "append_line", meet)
        assert quantize(model, out).exit_code == SUCCESS
    refused(seen[0], USAGE, "out' is being written by another process")
    assert names(out.parent) == {"out"}


# A full disk


def full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def test_a_full_disk_keeps_what_is_done(
    model: Path, whole: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CheckpointWriter.write

    def fills(self: CheckpointWriter, name: str, values: Any) -> None:
        write(self, name, values[: len(values) // 2] if "layers.1.mlp.up_proj" in name else values)
        if "layers.1.mlp.up_proj" in name:
            full()

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", fills)
        refused(quantize(model, out), RESOURCE, "no space left for", "goes on where it stopped")
    assert names(out.parent) == {".out.partial"}
    assert quantize(model, out).exit_code == SUCCESS
    assert names(out.parent) == {"out"} and contents(whole) == contents(out)


def test_a_disk_that_is_full_at_once_leaves_nothing(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "append_line", full)
    result = quantize(model, out)
    refused(result, RESOURCE, "no space left for")
    assert "goes on" not in result.stderr and names(out.parent) == set()


def test_room_is_checked_first(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """For a new run, and for one that goes on, which needs less and loses nothing."""
    stopped_at(out, "layer 2 of 3", model)
    size = (whole / "model.safetensors").stat().st_size
    used = sum(path.stat().st_size for path in out.parent.rglob("*") if path.is_file())
    usage = shutil.disk_usage(out.parent)
    room = size - used - 20_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room))
    refused(quantize(model, out), RESOURCE, f"bytes, and {room:,} are free")
    refused(quantize(model, out.with_name("new")), RESOURCE, f"bytes, and {room:,} are free")
    assert names(out.parent) == {".out.partial"}
    room = size - used + 20_000
    assert quantize(model, out).exit_code == SUCCESS
    assert contents(whole) == contents(out)


def test_an_error_leaves_nothing_also_when_it_went_on(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(out, "layer 2 of 3", model)

    def broken(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(CheckpointWriter, "write", broken)
    refused(quantize(model, out), RESOURCE, "not enough memory")
    assert names(out.parent) == set()
