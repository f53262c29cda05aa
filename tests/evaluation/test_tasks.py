"""Tasks of lm-evaluation-harness as `anequant eval --lm-eval` finds, runs, reports and refuses them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import Quantized
from running import Ran, invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

from anequant.cli import console
from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
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
    assert values["tasks"] == {"colours": {"acc,none": 1.0, "acc_stderr,none": 0.0}}
    assert values["shortened_prompts"] == 0


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
    assert (result.exit_code, result.stdout, result.stderr) == (0, "colours  acc 1.0000 ± 0.0000\n", "")
    result = run(tiny_qwen2, folder, "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_standard_errors(tiny_qwen2: Path, folder: Path) -> None:
    """That of a mean by its formula; a median's is resampled, 20,000 times here; bits per byte have none."""
    rows = [*QUESTIONS, {**QUESTIONS[0], "answer": 1}, QUESTIONS[1], {**QUESTIONS[1], "answer": 0}]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "colours.yaml"
    path.write_text(
        path.read_text() + "    aggregation: mean\n  - metric: acc_norm\n    aggregation: median\n"
    )
    right = [1.0, 1.0, 0.0, 1.0, 0.0]
    values = scores(tiny_qwen2, folder)["tasks"]
    assert values["colours"]["acc,none"] == pytest.approx(0.6)
    assert values["colours"]["acc_stderr,none"] == pytest.approx(statistics.stdev(right) / 5**0.5)
    draw = random.Random(1)
    medians = [statistics.median(draw.choices(right, k=5)) for _ in range(20_000)]
    assert values["colours"]["acc_norm,none"] == 1.0
    assert values["colours"]["acc_norm_stderr,none"] == pytest.approx(statistics.stdev(medians), rel=0.1)
    assert values["whole"].keys() == {"bits_per_byte,none"}
    shown = run(tiny_qwen2, folder).stdout.splitlines()
    assert "DISABLE_MULTIPROC" not in os.environ and len(shown) == 2
    assert shown[0].startswith("colours  acc 0.6000 ± 0.2449, acc_norm 1.0000 ± 0.")
    assert re.fullmatch(r"whole    bits_per_byte \d\.\d{4}", shown[1])


TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def conversing(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """The model with a chat template, which does not take system messages."""
    folder = tmp_path / "conversing"
    shutil.copytree(tiny_qwen2, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_prompts_are_conversations_by_the_chat_template(
    conversing: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts that the model goes on from are those of transformers' tokenizer, and so are likelihoods."""
    harness = pytest.importorskip("anequant.evaluation.harness")
    answer = harness.HarnessModel.loglikelihood
    seen: dict[tuple[str, str], tuple[float, bool]] = {}

    def watched(self: Any, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = answer(self, requests, **options)
        seen.update(zip([request.args for request in requests], answers, strict=True))
        return answers

    monkeypatch.setattr(harness.HarnessModel, "loglikelihood", watched)
    path, choices = folder / "colours.yaml", ([" blue", " qq zz xx"], [" vv jj kk", " sea"])
    plain = scores(conversing, path)
    assert list(seen)[:2] == [("The sky is", "  blue"), ("The sky is", "  qq zz xx")]
    seen.clear()
    asked = scores(conversing, path, "--apply-chat-template")
    assert asked["tasks"].keys() == plain["tasks"].keys()
    tokenizer = AutoTokenizer.from_pretrained(conversing)
    stock = AutoModelForCausalLM.from_pretrained(conversing, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
        )
        for row in QUESTIONS
    ]
    assert prompts[0] == "<|user|>The sky is<|end|><|assistant|>"
    assert list(seen) == [
        (prompt, text) for prompt, texts in zip(prompts, choices, strict=True) for text in texts
    ]
    for (prompt, text), (told, _) in seen.items():
        before, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + text)["input_ids"]
        with torch.no_grad():
            log_p = stock(torch.tensor([whole])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        wanted = torch.tensor(whole[len(before) :])
        assert told == pytest.approx(float(log_p.gather(-1, wanted[:, None]).sum()), rel=1e-5)

    seen.clear()
    path.write_text(path.read_text() + "num_fewshot: 1\nfewshot_split: test\n")
    scores(conversing, path, "--apply-chat-template")
    turns = [re.findall(r"<\|(\w+)\|>", context) for context, _ in seen]
    assert turns == 4 * [["user", "end", "assistant", "end", "user", "end", "assistant"]]


def test_chat_templates_that_are_missing_or_refuse(tiny_qwen2: Path, conversing: Path, folder: Path) -> None:
    path = folder / "colours.yaml"
    result = run(tiny_qwen2, path, "--apply-chat-template")
    assert result.exit_code == 2 and "the tokenizer has no chat template" in result.stderr
    assert "leave --apply-chat-template out" in result.stderr
    path.write_text(path.read_text() + "description: Answer.\n")
    result = run(conversing, path, "--apply-chat-template")
    assert result.exit_code == 3 and "does not take a prompt (system, user): no system here" in result.stderr
    result = invoke("eval", conversing, "--text", path, "--apply-chat-template")
    assert result.exit_code == 2 and "--apply-chat-template is for tasks" in result.stderr


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
