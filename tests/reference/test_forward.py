"""The layer-by-layer forward is the stock transformers model, whatever the architecture and its RoPE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from anequant.architectures.spec import ModelSpec
from anequant.checkpoints.reader import open_checkpoint
from anequant.errors import UnsupportedError
from anequant.reference.forward import (
    ReferenceModel,
    compute_logits,
    logits,
    run_to_final_states,
)
from anequant.targets.shared.rope_tables import compute_rope_tables

ORIGINAL = 64
"""The context that the models of this file were trained for, as far as their RoPE settings say."""

LONG = 2 * ORIGINAL
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0 + 0.05 * k for k in range(16)],
        "long_factor": [1.0 + 0.5 * k for k in range(16)],
        "original_max_position_embeddings": ORIGINAL,
    },
}
GROWING = ("dynamic", "longrope")
GENERATIONS = ("rope_parameters", "rope_scaling")


def positions_of(rope: str) -> int:
    """max_position_embeddings: dynamic RoPE takes it for the original context, the others for the new."""
    return ORIGINAL if rope == "dynamic" else 4 * ORIGINAL


@pytest.fixture
def model(make_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def build(model_type: str = "llama", rope: str = "default", generation: str = GENERATIONS[0]) -> Path:
        rope_values = {**ROPES[rope], "rope_theta": 500.0}
        folder = make_model(
            tmp_path / "model",
            model_type,
            False,
            rope_parameters=rope_values,
            max_position_embeddings=positions_of(rope),
        )
        if generation == "rope_scaling":
            as_transformers_4(folder / "config.json")
        return folder

    return build


def as_transformers_4(path: Path) -> None:
    """Rewrite config.json the way transformers 4 wrote it."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    path.write_text(json.dumps(config))


def some_tokens(count: int, length: int) -> Tensor:
    return torch.randint(97, (count, length), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def stock(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model(input_ids=tokens, use_cache=False, output_hidden_states=True)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_equals_the_whole_model(
    make_model: Callable[..., Path], tmp_path: Path, model_type: str, tied: bool
) -> None:
    folder = make_model(tmp_path / "model", model_type, tied)
    checkpoint = open_checkpoint(folder)
    tokens = some_tokens(5, 40)
    expected = stock(folder, tokens)
    assert_same(torch.stack(list(logits(checkpoint, tokens))), expected.logits)
    hidden = run_to_final_states(checkpoint, tokens)
    assert_same(hidden, expected.hidden_states[-1])
    assert_same(compute_logits(checkpoint.read(checkpoint.head_name), hidden), expected.logits)


def test_in_float64_equals_the_whole_model_in_float64(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", "qwen3", False)
    tokens = some_tokens(1, 40)
    actual = torch.stack(list(logits(open_checkpoint(folder), tokens, torch.float64)))
    expected = stock(folder, tokens, torch.float64).logits
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("rope", ROPES)
def test_equals_the_whole_model_with_any_rope(model: Callable[..., Path], rope: str, generation: str) -> None:
    folder = model(rope=rope, generation=generation)
    checkpoint = open_checkpoint(folder)
    for length in (ORIGINAL // 2, ORIGINAL, LONG):
        tokens = some_tokens(2, length)
        expected = stock(folder, tokens).logits
        assert_same(torch.stack(list(logits(checkpoint, tokens))), expected)


def test_the_rope_settings_above_differ(model: Callable[..., Path]) -> None:
    """Else the test above would not notice settings that are ignored."""
    spec = open_checkpoint(model()).spec
    tables = []
    for rope, values in ROPES.items():
        config = {
            **spec.config,
            "rope_parameters": {**values, "rope_theta": 500.0},
            "max_position_embeddings": positions_of(rope),
        }
        tables.append(ReferenceModel(replaced(spec, config), torch.float32).rope_tables(LONG)[0])
    for i, first in enumerate(tables):
        assert all(float((first - second).abs().max()) > 0.1 for second in tables[i + 1 :])


def replaced(spec: ModelSpec, config: dict[str, Any]) -> ModelSpec:
    from dataclasses import replace

    return replace(spec, config=config)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("rope", [name for name in ROPES if name != "longrope"])
def test_rope_tables_are_the_rotary_modules(
    model: Callable[..., Path], model_type: str, rope: str, generation: str
) -> None:
    folder = model(model_type, rope, generation)
    spec = open_checkpoint(folder).spec
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cos, sin = whole.model.rotary_emb(torch.empty(1), torch.arange(ORIGINAL)[None])
    assert cos.shape == (1, ORIGINAL, spec.head_dim)
    actual = ReferenceModel(spec, torch.float32).rope_tables(ORIGINAL)
    assert torch.equal(actual[0], cos) and torch.equal(actual[1], sin)
    lowered = compute_rope_tables(spec, ORIGINAL)
    assert torch.equal(lowered[0], cos[0]) and torch.equal(lowered[1], sin[0])


@pytest.mark.parametrize("rope", ROPES)
def test_lowered_tables_hold_for_every_shorter_prompt(model: Callable[..., Path], rope: str) -> None:
    folder = model(rope=rope)
    spec = open_checkpoint(folder).spec
    context = ORIGINAL if rope in GROWING else LONG
    cos, sin = compute_rope_tables(spec, context)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for length in (1, 2, 9, context // 2, context):
        expected_cos, expected_sin = whole.model.rotary_emb(torch.empty(1), torch.arange(length)[None])
        torch.testing.assert_close(cos[:length], expected_cos[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(sin[:length], expected_sin[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("context", [ORIGINAL + 1, LONG])
@pytest.mark.parametrize("rope", GROWING)
def test_a_rope_that_changes_with_the_prompt_is_refused(
    model: Callable[..., Path], rope: str, context: int
) -> None:
    spec = open_checkpoint(model(rope=rope)).spec
    with pytest.raises(UnsupportedError, match=f"RoPE changes .* within {context} tokens") as caught:
        compute_rope_tables(spec, context)
    assert "original" in caught.value.remedy


def test_a_longer_prompt_than_the_sliding_window_is_refused(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", "mistral", False, sliding_window=16)
    checkpoint = open_checkpoint(folder)
    short = some_tokens(1, 16)
    assert_same(torch.stack(list(logits(checkpoint, short))), stock(folder, short).logits)
    cos, _ = compute_rope_tables(checkpoint.spec, 16)
    assert cos.shape == (16, 32)
    with pytest.raises(UnsupportedError, match=r"17 tokens exceed .* window of 16"):
        list(logits(checkpoint, some_tokens(1, 17)))
    with pytest.raises(UnsupportedError, match=r"64 tokens exceed .* window of 16"):
        compute_rope_tables(checkpoint.spec, 64)


def test_a_window_that_is_switched_off_is_no_limit(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Qwen2's configs carry a sliding_window that use_sliding_window=false makes void."""
    folder = make_model(tmp_path / "model", "qwen2", False, sliding_window=16, use_sliding_window=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 16}))
    tokens = some_tokens(1, 40)
    actual = torch.stack(list(logits(open_checkpoint(folder), tokens)))
    assert_same(actual, stock(folder, tokens).logits)


def test_a_sliding_window_in_some_layers_is_a_limit(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model(
        tmp_path / "model", "qwen2", False, sliding_window=16, use_sliding_window=True, max_window_layers=2
    )
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UnsupportedError, match="sliding window of 16"):
        list(logits(checkpoint, some_tokens(1, 17)))
