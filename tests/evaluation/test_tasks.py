"""Tasks of lm-evaluation-harness as `anequant eval --lm-eval` finds, runs, reports and refuses them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import Quantized
from running import Ran, invoke

from anequant.cli import console
from anequant.pipeline.lower import lower
from anequant.recipe import LowerOptions
from anequant.request import LowerRequest

QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " qq zz xx"], "answer": 0},
    {"question": "They went down to the", "choices": [" vv jj kk", " sea"], "answer": 1},
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
ROLLING = """task: whole
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture(autouse=True)
def no_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it converted in the test's own folder, and slowness shows no progress."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(console, "SHOW_AFTER", 3600.0)


@pytest.fixture
def with_harness() -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'anequant[eval]'")


@pytest.fixture
def folder(with_harness: None, tmp_path: Path) -> Path:
    """Two tasks on the same two questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "colours.yaml").write_text(TASK.format(name="colours", data=data))
    (folder / "whole.yaml").write_text(ROLLING.format(data=data))
    return folder


def run(model: Path, tasks: object, *more: str) -> Ran:
    return invoke("eval", model, "--lm-eval", tasks, *more)


def scores(model: Path, tasks: object, *more: str) -> dict[str, Any]:
    result = run(model, tasks, *more, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    assert set(values) == {"checkpoint", "tasks", "shortened_prompts"}
    return values


def refusal(model: Path, tasks: object, code: int) -> str:
    result = run(model, tasks)
    assert result.exit_code == code, result.stderr
    assert result.stdout == "" and result.stderr.startswith("error: ")
    return result.stderr


def test_a_task_from_a_file(tiny_qwen2: Path, folder: Path) -> None:
    values = scores(tiny_qwen2, folder / "colours.yaml")
    assert values["tasks"] == {"colours": {"acc,none": 1.0}} and values["shortened_prompts"] == 0


def test_the_tasks_of_a_folder(tiny_qwen2: Path, folder: Path) -> None:
    values = scores(tiny_qwen2, folder)
    assert values["tasks"].keys() == {"colours", "whole"}
    both = scores(tiny_qwen2, f"{folder}/whole.yaml, {folder}/colours.yaml")
    assert both["tasks"] == values["tasks"]
    assert 1 < values["tasks"]["whole"]["bits_per_byte,none"] < 8


def test_the_packages_of_a_conversion(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], folder: Path, tmp_path: Path
) -> None:
    """A context of 10 tokens, which the longer question and its answers do not fit."""
    checkpoint = quantize_model(tiny_qwen2, "w4-nearest").folder
    lower(LowerRequest(checkpoint, LowerOptions(context=10, batch=2)), tmp_path / "out" / "packages")
    values = scores(tmp_path / "out", folder / "colours.yaml", "--backend", "interpreter")
    assert values["tasks"]["colours"]["acc,none"] in (0.0, 0.5, 1.0) and values["shortened_prompts"] > 0
    shown = run(tmp_path / "out", folder / "colours.yaml", "--backend", "interpreter").stdout
    assert f"shortened  {values['shortened_prompts']} prompts lost their beginning" in shown


def test_what_is_printed(tiny_qwen2: Path, folder: Path) -> None:
    result = run(tiny_qwen2, folder / "colours.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "colours  acc 1.0000\n", "")
    result = run(tiny_qwen2, folder, "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_progress_is_ours(tiny_qwen2: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SHOW_AFTER", 0.0)
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    lines = run(tiny_qwen2, folder / "colours.yaml").stderr.splitlines()
    assert len(lines) == 4 and all(line.startswith("lm-eval: likelihood ") for line in lines)


def test_names_and_patterns_are_the_harness_s(
    with_harness: None, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is downloaded here: a task that is known fails for its data. The index of all is made once."""
    lm_eval = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(lm_eval, "TaskManager", cache(lm_eval.TaskManager))
    assert "the data of 'piq*' cannot be had" in refusal(tiny_qwen2, "piq*", 5)
    assert "did you mean 'piqa'" in refusal(tiny_qwen2, "piqaa", 2)


def test_what_holds_no_task(tiny_qwen2: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no task" in refusal(tiny_qwen2, tmp_path / "empty", 2)
    assert "cannot be loaded" in refusal(tiny_qwen2, tmp_path / "gone.yaml", 2)
    (folder / "broken.yaml").write_text("task: broken\noutput_type: no_such_type\n")
    assert "broken.yaml' cannot be loaded" in refusal(tiny_qwen2, folder / "broken.yaml", 2)


def test_code_that_a_model_writes_is_not_run(tiny_qwen2: Path, folder: Path) -> None:
    path = folder / "colours.yaml"
    path.write_text(path.read_text() + "unsafe_code: true\n")
    assert "task 'colours' runs code" in refusal(tiny_qwen2, path, 4)


def test_packages_are_not_for_transformers(tmp_path: Path) -> None:
    (tmp_path / "meta.yaml").touch()
    assert "--backend interpreter" in refusal(tmp_path, "piqa", 2)


def test_without_the_harness(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "anequant[eval]" in refusal(tiny_qwen2, "piqa", 2)
