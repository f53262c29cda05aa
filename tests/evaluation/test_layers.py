"""Errors after every layer against transformers' own hidden states, and texts to evaluate on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM

from anequant.calibration.text import load_tokenizer, read_text, text_windows
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.cli import main
from anequant.pipeline.evaluate import evaluate_checkpoint
from anequant.rotation.plan import plan_rotations

WINDOWS, LENGTH = 3, 48


@torch.no_grad()
def residuals(folder: Path, tokens: Tensor) -> list[Tensor]:
    """The residual stream after every layer, float64; hooks, because the last hidden state is normalised."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.double()))
    model(tokens, use_cache=False)
    return seen


@pytest.mark.parametrize("r1", ["none", "hadamard", "random"])
def test_errors_are_those_of_rotated_hidden_states(
    tiny_qwen2: Path, quantize_model: Callable[..., Any], r1: str
) -> None:
    made = quantize_model(tiny_qwen2, "w4-nearest", r1=r1, seed=3)
    result = evaluate_checkpoint(
        str(made.folder), SAMPLE_TEXT, str(tiny_qwen2), windows=WINDOWS, length=LENGTH
    )
    tokens = text_windows(
        read_text(SAMPLE_TEXT), load_tokenizer(tiny_qwen2), 8189, count=WINDOWS, length=LENGTH
    )
    spec = open_checkpoint(tiny_qwen2).spec
    rotation = plan_rotations(spec, made.recipe).r1
    matrix = torch.eye(spec.hidden_size).double() if rotation is None else rotation.dense()
    pairs = zip(residuals(made.folder, tokens), residuals(tiny_qwen2, tokens), strict=True)
    expected = [float((ours - theirs @ matrix).norm() / theirs.norm()) for ours, theirs in pairs]
    assert result.layers is not None
    assert [error.layer for error in result.layers] == list(range(4))
    assert [error.relative_error for error in result.layers] == pytest.approx(expected, rel=1e-3)
    assert max(expected) < 0.3


def test_a_float_model_against_itself(tiny_qwen2: Path) -> None:
    result = evaluate_checkpoint(
        str(tiny_qwen2), SAMPLE_TEXT, str(tiny_qwen2), windows=WINDOWS, length=LENGTH
    )
    assert result.layers is not None and all(error.relative_error == 0 for error in result.layers)


def test_an_unknown_rotation_is_said(
    tiny_qwen2: Path, quantize_model: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(quantize_model(tiny_qwen2, "w4-nearest").folder, tmp_path / "foreign")
    (tmp_path / "foreign" / "anequant.json").unlink()
    arguments = ["eval", str(tmp_path / "foreign"), "--text", str(SAMPLE_TEXT), "--base", str(tiny_qwen2)]
    result = CliRunner().invoke(main, [*arguments, "--windows", "1", "--length", "16"])
    assert result.exit_code == 0
    assert "not compared: the checkpoint has no anequant.json" in result.stdout


def test_wikitext2_is_a_text(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: str, split: str) -> dict[str, list[str]]:
        assert args == ("Salesforce/wikitext", "wikitext-2-raw-v1") and split == "test"
        return {"text": SAMPLE_TEXT.read_text().splitlines()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ["eval", str(tiny_qwen2), "--text", "wikitext2", "--windows", "2", "--length", "32"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["text"] == "wikitext2" and values["windows"] == 2 and values["layers"] is None


def test_wikitext2_without_a_network(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: str, split: str) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = CliRunner().invoke(main, ["eval", str(tiny_qwen2), "--text", "wikitext2"])
    assert result.exit_code == 5 and "WikiText-2" in result.stderr and result.stdout == ""


def test_something_to_evaluate_on_is_needed(tiny_qwen2: Path) -> None:
    result = CliRunner().invoke(main, ["eval", str(tiny_qwen2)])
    assert result.exit_code == 2 and "--lm-eval" in result.stderr
