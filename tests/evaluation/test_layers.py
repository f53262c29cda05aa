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
from conftest import Quantized
from running import Ran, invoke, succeed
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.evaluation.divergence import measure_embedding_error, measure_layer_errors
from anequant.evaluation.evaluate import evaluate_checkpoint
from anequant.recipe_files import load_recipe
from anequant.reference.rotated_model import RotatedModel
from anequant.reference.sources import read_text
from anequant.reference.windows import cut_windows, load_tokenizer
from anequant.rotation.model_in_memory import rotate_in_memory
from anequant.rotation.rotation_plan import plan_rotations

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


@pytest.mark.parametrize(
    ("recipe", "r1", "limit"),
    [
        ("w4-nearest", "none", 0.3),
        ("w4-nearest", "hadamard", 0.3),
        ("w4-nearest", "random", 0.3),
        ("w8-nearest", "hadamard", 0.02),
        ("w8-nearest", "block-hadamard", 0.02),
    ],
)
def test_errors_are_those_of_rotated_hidden_states(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], recipe: str, r1: str, limit: float
) -> None:
    made = quantize_model(tiny_qwen2, recipe, r1=r1, seed=3)
    result = evaluate_checkpoint(
        str(made.folder), SAMPLE_TEXT, str(tiny_qwen2), windows=WINDOWS, length=LENGTH
    )
    tokens = cut_windows(
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
    assert 0 < max(expected) < limit


def test_a_float_model_against_itself(tiny_qwen2: Path) -> None:
    result = evaluate_checkpoint(
        str(tiny_qwen2), SAMPLE_TEXT, str(tiny_qwen2), windows=WINDOWS, length=LENGTH
    )
    assert result.layers is not None and all(error.relative_error == 0 for error in result.layers)


def compared(model: Path, base: Path, *more: str) -> Ran:
    arguments = ["eval", str(model), "--text", str(SAMPLE_TEXT), "--base", str(base)]
    return invoke(*arguments, "--windows", "1", "--length", "16", *more)


def test_the_worst_three_layers_are_printed(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized]
) -> None:
    folder = quantize_model(tiny_qwen2, "w4-nearest").folder
    values = json.loads(compared(folder, tiny_qwen2, "--json").stdout)
    assert values["layers_missing"] is None
    assert [set(entry) for entry in values["layers"]] == [{"layer", "relative_error"}] * 4
    ordered = sorted(values["layers"], key=lambda entry: -entry["relative_error"])
    worst = ", ".join(f"{entry['layer']} ({entry['relative_error']:.2%})" for entry in ordered[:3])
    assert f"off most after layer {worst}\n" in compared(folder, tiny_qwen2).stdout


@pytest.mark.parametrize("manifest", [None, {"format": 1, "kind": "packages"}])
def test_an_unknown_rotation_is_said(
    tiny_qwen2: Path,
    quantize_model: Callable[..., Quantized],
    tmp_path: Path,
    manifest: dict[str, Any] | None,
) -> None:
    shutil.copytree(quantize_model(tiny_qwen2, "w4-nearest").folder, tmp_path / "foreign")
    (tmp_path / "foreign" / "anequant.json").unlink()
    if manifest is not None:
        (tmp_path / "foreign" / "anequant.json").write_text(json.dumps(manifest))
    result = compared(tmp_path / "foreign", tiny_qwen2)
    assert result.exit_code == 0
    assert "not compared: the checkpoint has no anequant.json" in result.stdout
    values = json.loads(compared(tmp_path / "foreign", tiny_qwen2, "--json").stdout)
    assert values["layers"] is None and "has no anequant.json" in values["layers_missing"]


def test_a_base_of_another_shape_compares_only_what_is_said(tiny_qwen2: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_qwen2, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    result = compared(tiny_qwen2, tmp_path)
    assert result.exit_code == 0 and "extra NLL" in result.stdout
    assert "not compared: the base has 2 layers of width 192, the checkpoint 4 of 192" in result.stdout


def test_a_rotation_that_nothing_tells_is_noticed(
    tiny_qwen2: Path, tmp_path: Path, quantize_model: Callable[..., Quantized]
) -> None:
    """Turned float weights without a recipe, and a base that the checkpoint was not made from."""
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    rotate_in_memory(model, load_recipe("w4-nearest"))
    model.save_pretrained(tmp_path / "turned")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copyfile(tiny_qwen2 / name, tmp_path / "turned" / name)
    AutoModelForCausalLM.from_config(model.config).save_pretrained(tmp_path / "other")
    quantized = quantize_model(tiny_qwen2, "w4-nearest").folder
    for ours, base in ((tmp_path / "turned", tiny_qwen2), (quantized, tmp_path / "other")):
        result = compared(ours, base)
        assert result.exit_code == 0 and "not compared: the embedding is " in result.stdout


@pytest.mark.parametrize("r1", ["none", "hadamard", "block-hadamard", "random"])
@pytest.mark.parametrize("fold_scales", [False, True])
def test_turning_alone_moves_nothing(tiny_qwen2: Path, r1: str, fold_scales: bool) -> None:
    """The float model after folding and rotation, read as a model of its own."""
    checkpoint = open_checkpoint(tiny_qwen2)
    plan = plan_rotations(checkpoint.spec, load_recipe("w4-nearest", {"r1": r1}))
    turned = TurnedWeights(RotatedModel(checkpoint, plan, fold_scales))
    tokens = torch.randint(checkpoint.spec.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    rotate = plan.r1.apply if plan.r1 is not None else lambda hidden: hidden
    errors = measure_layer_errors(turned, checkpoint, tokens, rotate)
    assert max(error.relative_error for error in errors) < 2e-6
    assert measure_embedding_error(turned, checkpoint, tokens, rotate) < 1e-6
    if plan.r1 is not None:
        assert measure_embedding_error(turned, checkpoint, tokens, lambda hidden: hidden) > 0.5


class TurnedWeights:
    """A RotatedModel's Weights up to the head."""

    head_name = ""

    def __init__(self, model: RotatedModel) -> None:
        self.spec, self.online = model.spec, model.online
        self.layer = model.float_layer
        self._model = model

    def read(self, name: str) -> Tensor:
        assert name == "model.embed_tokens.weight"
        return torch.cat(list(self._model.embedding()))

    def final_gain(self) -> Tensor:
        return torch.ones(self.spec.hidden_size)


def test_a_quantized_base_is_in_a_basis_of_its_own(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized]
) -> None:
    base = quantize_model(tiny_qwen2, "w8-nearest").folder
    result = compared(quantize_model(tiny_qwen2, "w4-nearest").folder, base)
    assert result.exit_code == 0 and "not compared: the base is quantized itself" in result.stdout


def test_wikitext2_is_a_text(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: str, split: str) -> dict[str, list[str]]:
        assert args == ("Salesforce/wikitext", "wikitext-2-raw-v1") and split == "test"
        return {"text": SAMPLE_TEXT.read_text().splitlines()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ["eval", str(tiny_qwen2), "--text", "wikitext2", "--windows", "2", "--length", "32"]
    result = succeed(*arguments, "--json")
    values = json.loads(result.stdout)
    assert values["text"] == "wikitext2" and values["windows"] == 2 and values["layers"] is None


def test_wikitext2_without_a_network(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: str, split: str) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = invoke("eval", tiny_qwen2, "--text", "wikitext2")
    assert result.exit_code == 5 and "WikiText-2" in result.stderr and result.stdout == ""


def test_something_to_evaluate_on_is_needed(tiny_qwen2: Path) -> None:
    result = invoke("eval", tiny_qwen2)
    assert result.exit_code == 2 and "--lm-eval" in result.stderr


def test_a_base_needs_a_text(tiny_qwen2: Path) -> None:
    result = invoke("eval", tiny_qwen2, "--lm-eval", "x", "--base", tiny_qwen2)
    assert result.exit_code == 2 and "--text" in result.stderr
