"""`anequant batch`: many models and recipes, past failures, in several runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from running import Ran, invoke, succeed

from anequant.comparison import batch as module
from anequant.comparison.batch import DONE, FAILED, STATE, TAKEN_OVER
from anequant.comparison.batch_file import read_batch
from anequant.errors import Interrupted
from anequant.jobs.control import Run, Unit
from anequant.lower_options import LowerOptions
from anequant.pipeline.quantize import quantize
from anequant.pipeline.steps.collect_tokens import collect_tokens
from anequant.recipe import Calibration
from anequant.report.terminal.tables import BATCH_COLUMNS
from anequant.request import Request

USAGE, INPUT, INTERRUPTED = 2, 3, 130
HEAD = """
output = "out"
[calibration]
samples = 3
length = 16
[lowering]
context = 32
batch = 16
"""


def job(**keys: Any) -> str:
    words = {True: "true", False: "false"}
    lines = [f"{key} = {words.get(value) or json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(["", "[[job]]", *lines, ""])


def calibrated(line: str) -> str:
    """The head with one more line on calibration."""
    return HEAD.replace("[calibration]\n", f"[calibration]\n{line}\n")


def run(*words: object) -> Ran:
    return invoke("batch", "jobs.toml", *words)


def last_jobs(count: int) -> None:
    """Leave only these in the file."""
    head, *jobs = Path("jobs.toml").read_text(encoding="utf-8").split("[[job]]")
    Path("jobs.toml").write_text("[[job]]".join([head, *jobs[-count:]]), encoding="utf-8")


def states(result: Ran) -> dict[str, str]:
    return {row["name"]: row["state"] for row in json.loads(result.stdout)["jobs"]}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.name not in ("report.json", "report.html")
    }


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models, and one that is damaged."""
    home = tmp_path_factory.mktemp("models")
    make_model(home / "llama", "llama", False, vocab_size=96)
    make_model(home / "qwen", "qwen2", True, vocab_size=96)
    shutil.copytree(home / "llama", home / "broken")
    (home / "broken" / "config.json").write_text("{", encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def text(models: Path) -> str:
    """Five jobs, the second of which fails; the third and fourth calibrate."""
    return "".join(
        [
            HEAD,
            job(model=str(models / "llama"), recipe="w4-nearest"),
            job(model=str(models / "broken"), name="broken", packages=False),
            job(model=str(models / "llama"), name="gptq", recipe="w4-ane", packages=False),
            "overrides = { descent = 1, refinement = 1 }\n",
            job(model=str(models / "llama"), name="gptq-6", recipe="w6-ane", packages=False),
            "overrides = { descent = 0, refinement = 0 }\n",
            job(model=str(models / "qwen"), name="qwen", recipe="w8-nearest", packages=False),
        ]
    )


@pytest.fixture
def place(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("jobs.toml").write_text(text, encoding="utf-8")
    return tmp_path


def test_a_batch_goes_on_past_a_failure_and_is_taken_over(
    place: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[str] = []

    def spy(calibration: Calibration, checkpoint: Any, *more: Any) -> Any:
        collected.append(checkpoint.folder.name)
        return collect_tokens(calibration, checkpoint, *more)

    monkeypatch.setattr(module, "collect_tokens", spy)
    result = run("--json")
    assert result.exit_code == INPUT, result.stderr
    done = dict.fromkeys(["llama-w4-nearest", "gptq", "gptq-6", "qwen"], DONE)
    assert states(result) == {**done, "broken": FAILED}
    assert collected == ["llama"]
    assert sorted(path.name for path in Path("out").iterdir()) == sorted([*done, STATE])
    rows = {row["name"]: row for row in json.loads(result.stdout)["jobs"]}
    assert "config.json" in rows["broken"]["failed"] and rows["broken"]["exit_code"] == INPUT
    assert rows["qwen"]["bits"]["projections"] > 8 > rows["gptq"]["bits"]["projections"] > 4

    few = ("--calib-samples", "3", "--calib-length", "16")
    quick = ("--recipe", "w4-ane", "--descent", "1", "--refinement", "1")
    words = ["quantize", str(models / "llama"), "-o", "alone", *quick, *few]
    succeed(*words)
    assert contents(Path("alone")) == contents(Path("out/gptq"))

    before = contents(Path("out"))
    result = run()
    assert result.exit_code == INPUT and contents(Path("out")) == before
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert tuple(lines[0]) == BATCH_COLUMNS
    assert {line[0]: line[-1] for line in lines[1:6]} == {**dict.fromkeys(done, TAKEN_OVER), "broken": FAILED}
    assert lines[6][0].startswith("failed  broken: ")

    changed = (place / "jobs.toml").read_text().replace("w8-nearest", "w4-nearest")
    (place / "jobs.toml").write_text(changed, encoding="utf-8")
    result = run("--json")
    row = json.loads(result.stdout)["jobs"][-1]
    assert (row["state"], row["exit_code"]) == (FAILED, USAGE)
    assert "had recipe.bits 8, this one has 4" in row["failed"] and "--force" in row["failed"]
    assert contents(Path("out")) == before
    result = run("--json", "--force")
    assert states(result) == {**dict.fromkeys(done, TAKEN_OVER), "qwen": DONE, "broken": FAILED}
    assert collected == ["llama"]


def test_an_interrupted_batch_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last_jobs(3)
    asked: list[Any] = []
    units: list[Unit] = []

    def embedded() -> bool:
        return any(unit.name == "embedding" for unit in units)

    def interrupted(request: Request, output: Path, run: Run) -> Any:
        asked.append(request.tokens)
        if len(asked) == 2:
            run = replace(run, finished=units.append, stopping=embedded)
        return quantize(request, output, run)

    monkeypatch.setattr(module, "quantize", interrupted)
    result = run()
    assert result.exit_code == INTERRUPTED, result.stderr
    assert "gptq: done" in result.stderr and "to go on: anequant" in result.stderr
    assert sorted(path.name for path in Path("out").iterdir()) == [".gptq-6.partial", STATE, "gptq"]
    result = run("--json")
    assert result.exit_code == 0, result.stderr
    assert states(result) == {"gptq": TAKEN_OVER, "gptq-6": DONE, "qwen": DONE}
    assert "resuming 'out/gptq-6'" in result.stderr
    assert asked[2] is None, "the interrupted run kept its tokens"


def test_an_output_that_nobody_knows_is_left_alone(place: Path) -> None:
    Path("out/qwen").mkdir(parents=True)
    Path("out/qwen/mine").touch()
    last_jobs(1)
    result = run("--json")
    assert states(result) == {"qwen": FAILED} and result.exit_code == USAGE
    assert Path("out/qwen/mine").exists()
    assert states(run("--json", "--force")) == {"qwen": DONE}
    assert not Path("out/qwen/mine").exists()


def test_a_crash_before_the_record_loses_nothing(place: Path) -> None:
    last_jobs(1)
    assert states(run("--json")) == {"qwen": DONE}
    state = json.loads(Path("out", STATE).read_text())
    state["jobs"]["qwen"]["seconds"] = None
    Path("out", STATE).write_text(json.dumps(state))
    result = run("--json")
    assert states(result) == {"qwen": TAKEN_OVER}
    assert json.loads(result.stdout)["jobs"][0]["seconds"] is None


# Files


def test_what_a_file_says(tmp_path: Path) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(
        HEAD
        + job(model="org/name@main", recipe="w6-ane")
        + "lowering = { context = 64, chunks = 3 }\noverrides = { bits = 4 }\n"
        + job(model="folder/model", name="plain", packages=False),
        encoding="utf-8",
    )
    batch = read_batch(file)
    assert batch.output == Path("out") and batch.calibration == Calibration(samples=3, length=16)
    first, second = batch.jobs
    assert (first.name, first.recipe, first.overrides) == ("name-w6-ane", "w6-ane", {"bits": 4})
    assert first.lowering == LowerOptions(context=64, batch=16, chunks=3)
    assert (second.name, second.recipe, second.lowering) == ("plain", "w4-ane", None)


@pytest.mark.parametrize(
    ("line", "sources", "weights", "chat"),
    [
        ('source = "a.txt"', ("a.txt",), (), False),
        ('source = ["self", "a.txt=2"]\nchat = true', ("self", "a.txt"), (1.0, 2.0), True),
    ],
)
def test_sources_are_a_string_or_several(
    tmp_path: Path, line: str, sources: tuple[str, ...], weights: tuple[float, ...], chat: bool
) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(calibrated(line) + job(model="a"), encoding="utf-8")
    assert read_batch(file).calibration == Calibration(sources, 3, 16, 0, weights, chat)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output = ", "cannot be read"),
        ("", "there is no 'output'"),
        ('output = "out"', "there is no 'job'"),
        ('output = "out"\njob = []', "there is no job"),
        ('output = "out"\njob = [1]', "a job is no table"),
        (HEAD + job(name="a"), "there is no 'model'"),
        (HEAD + job(model="a", recipes="b"), "unknown key 'recipes'"),
        (HEAD + job(model="a", packages="no"), "'packages' is 'no', and has to be true or false"),
        (HEAD + job(model=3), "'model' is 3, and has to be a string"),
        (HEAD + job(model="a", recipe="w5-moon"), "unknown recipe 'w5-moon'"),
        (HEAD + job(model="a") + "overrides = { bit = 4 }", "unknown recipe key 'bit'"),
        (HEAD + job(model="a") + "overrides = { bits = 5 }", "bits"),
        (HEAD + job(model="a") + "lowering = { contexts = 4 }", "unknown key 'contexts'"),
        (HEAD + job(model="a") + "lowering = { context = true }", "and has to be a whole number"),
        (HEAD + job(model="a", name="../b"), "the name '../b' cannot be a folder's"),
        (HEAD + job(model="x/a") + job(model="y/a"), "two jobs are called 'a-w4-ane'"),
        (HEAD.replace("samples = 3", "samples = 0") + job(model="a"), "'samples' is 0, the least is 1"),
        (HEAD.replace("length", "lengths") + job(model="a"), "unknown key 'lengths'"),
        (calibrated("source = 3") + job(model="a"), "'source' is 3, and has to be a string or an array"),
        (calibrated('source = ["a", 3]') + job(model="a"), "'source' is ['a', 3], and has to hold strings"),
        (calibrated('source = ["a", "a"]') + job(model="a"), "'a' is named twice"),
        (calibrated('source = ["a=0", "b"]') + job(model="a"), "weight of calibration source 'a' is 0"),
        (calibrated("source = []") + job(model="a"), "no calibration source"),
        (calibrated("chat = 1") + job(model="a"), "'chat' is 1, and has to be true or false"),
    ],
)
def test_a_wrong_file_is_refused(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("jobs.toml").write_text(text, encoding="utf-8")
    result = run()
    assert (result.exit_code, list(tmp_path.iterdir())) == (USAGE, [tmp_path / "jobs.toml"]), result.stderr
    assert words in result.stderr and "jobs.toml" in result.stderr and "Traceback" not in result.stderr


def test_a_file_or_a_record_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run().exit_code == USAGE and list(tmp_path.iterdir()) == []
    Path("jobs.toml").write_text(HEAD + job(model="a"), encoding="utf-8")
    Path("out").mkdir()
    Path("out", STATE).write_text('{"jobs": [1]}', encoding="utf-8")
    result = run()
    assert result.exit_code == INPUT and f"'out/{STATE}' is no record of a batch" in result.stderr
    shutil.rmtree("out")
    Path("out").touch()
    result = run()
    assert result.exit_code == USAGE and "output 'out' cannot be created" in result.stderr


def test_an_interrupt_before_anything_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "quantize", stop)
    last_jobs(1)
    result = run()
    assert result.exit_code == INTERRUPTED and "'qwen' was not begun" in result.stderr


def test_a_batch_is_interrupted_in_a_report(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise Interrupted("kept", ["report", "out"])

    monkeypatch.setattr(module, "quantize", stop)
    monkeypatch.setattr("sys.argv", ["anequant", "batch", "jobs.toml"])
    last_jobs(1)
    result = run()
    assert result.exit_code == INTERRUPTED and "to go on: anequant batch jobs.toml" in result.stderr
