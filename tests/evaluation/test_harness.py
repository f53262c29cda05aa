"""lm-evaluation-harness on our decoders, against likelihoods taken from stock transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from anequant.cli import main
from anequant.evaluation.harness import _harness_model, likelihood
from anequant.pipeline.generate import TextModel, open_text_model
from anequant.pipeline.lower import LowerOptions, lower

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'anequant[eval]'")

CONTEXT = 48
PAIRS = [
    ("The man went to the", " door"),
    ("She was", " not at all surprised by it"),
    ("In the", " morning "),
    ("", "Once upon a time"),
]
TASK = """task: colours
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


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen2: Path, quantize_model: Callable[..., Any]) -> Path:
    folder: Path = quantize_model(tiny_qwen2, "w4-nearest").folder
    return folder


@pytest.fixture(scope="module", params=["transformers", "interpreter"])
def model(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> TextModel:
    if request.param == "transformers":
        return open_text_model(checkpoint, "transformers")
    folder = tmp_path_factory.mktemp("packages") / "out"
    lower(checkpoint, folder, LowerOptions(context=CONTEXT, batch=8))
    return open_text_model(folder, "interpreter")


@torch.no_grad()
def literal(checkpoint: Path, context: str, continuation: str) -> tuple[float, bool]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    before = tokenizer(context)["input_ids"] if context else [8189]
    whole = tokenizer(context + continuation)["input_ids"]
    wanted = whole[len(before) :] if context else whole
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    log_p = stock(torch.tensor([before + wanted])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    chosen = log_p[torch.arange(len(wanted)), wanted]
    return float(chosen.sum()), bool((log_p.argmax(-1) == torch.tensor(wanted)).all())


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def test_likelihoods_are_transformers(model: TextModel, checkpoint: Path) -> None:
    adapter = _harness_model(model.decoder, model.tokenizer, 8189, model.stop)
    ours = adapter.loglikelihood([Request(*pair) for pair in PAIRS])
    stripped = [(context.rstrip(), continuation) for context, continuation in PAIRS]
    for (total, greedy), pair in zip(ours, stripped, strict=True):
        expected, expected_greedy = literal(checkpoint, *pair)
        assert total == pytest.approx(expected, rel=5e-3)
        assert greedy == expected_greedy


def test_greedy_continuations_are_recognised(model: TextModel) -> None:
    context = model.tokenizer("In the morning they")["input_ids"]
    model.decoder.reset()
    best = int(model.decoder.feed(context).argmax())
    assert likelihood(model.decoder, context, [best])[1] is True
    assert likelihood(model.decoder, context, [best + 1])[1] is False


def test_a_long_text_rolls_through_the_context(model: TextModel) -> None:
    text = "the old man walked slowly down the road to the sea and looked at the boats. " * 6
    adapter = _harness_model(model.decoder, model.tokenizer, 8189, model.stop)
    tokens = model.tokenizer(text)["input_ids"]
    (total,) = adapter.loglikelihood_rolling([Request(text)])
    if len(tokens) <= model.decoder.context:
        assert total == pytest.approx(likelihood(model.decoder, [8189], tokens)[0], rel=1e-6)
        return
    pieces, start = 0.0, 0
    while start < len(tokens):
        part = tokens[start : start + CONTEXT]
        before = [8189] if start == 0 else tokens[start - 1 : start]
        if len(part) < CONTEXT:
            window = tokens[-CONTEXT - 1 :]
            before, part = window[: -len(part)], part
        pieces += likelihood(model.decoder, before, part)[0]
        start += CONTEXT
    assert total == pytest.approx(pieces, rel=1e-5)


def test_generation_stops_at_the_asked_for_text(model: TextModel) -> None:
    adapter = _harness_model(model.decoder, model.tokenizer, 8189, model.stop)
    (whole,) = adapter.generate_until([Request("In the morning", {"max_gen_toks": 10, "until": []})])
    end = whole.split()[2]
    (cut,) = adapter.generate_until([Request("In the morning", {"max_gen_toks": 10, "until": [end]})])
    assert cut == whole[: whole.find(end)] and len(cut) < len(whole)


def test_a_task_from_a_file(checkpoint: Path, tmp_path: Path) -> None:
    rows = [
        {"question": "The sky is", "choices": [" blue", " qq zz xx"], "answer": 0},
        {"question": "They went down to the", "choices": [" vv jj kk", " sea"], "answer": 1},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    arguments = ["eval", str(checkpoint), "--lm-eval", str(tmp_path / "colours.yaml"), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tasks"]["colours"]["acc,none"] == 1.0


@pytest.mark.parametrize(
    ("tasks", "message"), [("no_such_task", "knows no task"), ("gone.yaml", "cannot be read")]
)
def test_an_unknown_task(checkpoint: Path, tasks: str, message: str) -> None:
    result = CliRunner().invoke(main, ["eval", str(checkpoint), "--lm-eval", tasks])
    assert result.exit_code == 2 and message in result.stderr


def test_without_the_harness(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = CliRunner().invoke(main, ["eval", str(checkpoint), "--lm-eval", "piqa"])
    assert result.exit_code == 2 and "anequant[eval]" in result.stderr
