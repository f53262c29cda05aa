"""measure_quality() against the same numbers computed in float64 from the logits of stock transformers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Quantized
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.checkpoints.stored_bits import measure_stored_bits
from anequant.errors import UsageError
from anequant.evaluation.divergence import measure_noise_floor, measure_quality, record_reference
from anequant.evaluation.evaluate import evaluate_checkpoint
from anequant.evaluation.quality import find_percentiles
from anequant.reference.windows import cut_windows, find_start_token, load_tokenizer
from anequant.report.terminal.quality_rows import describe_evaluation, describe_quality

STORY = (
    "The old house stood at the end of the lane, and nobody in the village could say who had built it. In "
    "the winter its windows were dark; in the summer a light moved from room to room, and the children who "
    "were sent to bed before sunset lay awake and watched it. When Anna was nine she asked her grandfather "
    "about it. He put down his pipe, looked at the hill for a long time, and told her to finish her soup. "
) * 8


@pytest.fixture(scope="module")
def tokens(tiny_qwen2: Path) -> Tensor:
    tokenizer = load_tokenizer(tiny_qwen2)
    start = find_start_token(tokenizer, open_checkpoint(tiny_qwen2).spec.config)
    return cut_windows(STORY, tokenizer, start, count=5, length=64)


@torch.no_grad()
def log_probabilities(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.double().log_softmax(-1)[:, :-1]


def nll_of(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Mean over each window: [windows]."""
    return -log_p.gather(-1, tokens[:, 1:, None])[..., 0].mean(1)


@pytest.mark.parametrize("recipe", ["w4-nearest", "w_int8_per_tensor"])
def test_a_quantized_checkpoint_against_its_float_model(
    quantize_model: Callable[..., Quantized], tiny_qwen2: Path, tokens: Tensor, recipe: str
) -> None:
    folder = quantize_model(tiny_qwen2, recipe).folder
    quality = measure_quality(open_checkpoint(folder), tokens, open_checkpoint(tiny_qwen2))

    log_p, log_q = log_probabilities(tiny_qwen2, tokens), log_probabilities(folder, tokens)
    base_nll, nll = nll_of(log_p, tokens), nll_of(log_q, tokens)
    assert quality.windows == 5 and quality.tokens == 5 * 63
    assert quality.nll == pytest.approx(float(nll.mean()), rel=1e-5)
    assert quality.base_nll == pytest.approx(float(base_nll.mean()), rel=1e-5)
    assert quality.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=1e-4)
    assert quality.nll_error == pytest.approx(float(nll.std()) / 5**0.5, rel=1e-4)
    assert quality.extra_nll == pytest.approx(float((nll - base_nll).mean()), abs=1e-5)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert quality.kl == pytest.approx(divergence, rel=1e-3, abs=1e-6) and divergence > 0
    assert quality.top1 == pytest.approx(
        float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()), abs=1e-9
    )

    values = quality.to_dict()
    assert values["perplexity"] == quality.perplexity
    assert values["base_perplexity"] == pytest.approx(math.exp(float(base_nll.mean())), rel=1e-4)

    kl = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double().numpy()
    for name, own in {
        "nll": nll.numpy(),
        "extra_nll": (nll - base_nll).numpy(),
        "kl": kl.mean(1),
        "top1": same.mean(1),
    }.items():
        assert values["by_window"][name] == pytest.approx(own, rel=1e-3, abs=1e-5), name
        error = own.std(ddof=1) / 5**0.5
        assert values[f"{name}_error"] == pytest.approx(error, rel=1e-2, abs=1e-6), name
        ends = stats.t.interval(0.95, 4, own.mean(), error)
        assert values[f"{name}_interval"] == pytest.approx(ends, rel=1e-2, abs=1e-5), name
    assert values["extra_nll"] == pytest.approx(
        math.log(values["perplexity"] / values["base_perplexity"]), abs=1e-9
    )
    percentiles = dict(
        zip(("median", "p90", "p99", "p99_9"), np.percentile(kl, (50, 90, 99, 99.9)), strict=True)
    )
    assert values["kl_percentiles"] == pytest.approx({**percentiles, "maximum": kl.max()}, rel=1e-3, abs=1e-6)


def test_a_model_against_itself(tiny_qwen2: Path, tokens: Tensor) -> None:
    checkpoint = open_checkpoint(tiny_qwen2)
    quality = measure_quality(checkpoint, tokens, checkpoint)
    assert quality.kl == 0 and quality.top1 == 1
    assert quality.extra_nll == pytest.approx(0, abs=1e-12)
    assert quality.nll == pytest.approx(quality.base_nll, abs=1e-12)


def test_without_a_base(tiny_qwen2: Path, tokens: Tensor) -> None:
    quality = measure_quality(open_checkpoint(tiny_qwen2), tokens)
    expected = nll_of(log_probabilities(tiny_qwen2, tokens), tokens)
    assert quality.nll == pytest.approx(float(expected.mean()), rel=1e-5)
    assert quality.base_nll is quality.extra_nll is quality.kl is quality.top1 is None
    assert quality.by_window.nll == pytest.approx(expected.tolist(), rel=1e-5)
    values = quality.to_dict()
    told = {"windows", "tokens", "perplexity", "nll", "nll_error", "nll_interval", "by_window"}
    assert {name for name, value in values.items() if value is not None} == told
    assert {name for name, value in values["by_window"].items() if value is not None} == {"nll"}


def test_one_window_has_no_standard_error(tiny_qwen2: Path, tokens: Tensor) -> None:
    checkpoint = open_checkpoint(tiny_qwen2)
    assert measure_quality(checkpoint, tokens[:1]).nll_error is None
    parts = [measure_quality(checkpoint, tokens[i : i + 1]).nll for i in range(5)]
    assert measure_quality(checkpoint, tokens).nll == pytest.approx(sum(parts) / 5, rel=1e-6)
    single = measure_quality(checkpoint, tokens[:1], checkpoint)
    values = single.to_dict()
    assert all(values[f"{name}_{what}"] is None for name in ("kl", "top1") for what in ("error", "interval"))
    assert "±" not in " ".join(text for _, text in describe_quality(single))


def test_percentiles_are_numpys() -> None:
    values = torch.randn(4321, generator=torch.Generator().manual_seed(1)).exp()
    found = find_percentiles(values)
    assert astuple(found) == pytest.approx(
        [*np.percentile(values.double().numpy(), (50, 90, 99, 99.9)), float(values.max())], rel=1e-12
    )
    assert astuple(find_percentiles(torch.tensor([2.0, 4.0]))) == pytest.approx((3, 3.8, 3.98, 3.998, 4))


def test_more_bits_are_closer(
    quantize_model: Callable[..., Quantized], tiny_qwen2: Path, tokens: Tensor
) -> None:
    """The published scheme at 4 bits, ours at 4, ours at 8: each much closer to the float model."""
    base = open_checkpoint(tiny_qwen2)
    folders = [
        quantize_model(tiny_qwen2, name).folder for name in ("w_int4_per_tensor", "w4-nearest", "w8-nearest")
    ]
    divergences: list[float] = []
    for folder in folders:
        kl = measure_quality(open_checkpoint(folder), tokens, base).kl
        assert kl is not None
        divergences.append(kl)
    assert divergences[0] > 2 * divergences[1] > 20 * divergences[2] > 0


# --- float16 against float32 ----------------------------------------------------------------------------


def test_the_noise_floor_is_that_of_stock_transformers_in_float16(tiny_qwen2: Path) -> None:
    """Half a model differs by its order of operations too: the same size, and not the same digits."""
    tokenizer, checkpoint = load_tokenizer(tiny_qwen2), open_checkpoint(tiny_qwen2)
    start = find_start_token(tokenizer, checkpoint.spec.config)
    tokens = cut_windows(STORY, tokenizer, start, count=10, length=64)
    assert len(tokens) == 10
    noise = measure_noise_floor(checkpoint, tokens, record_reference(checkpoint, tokens))
    half = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float16).eval()
    with torch.no_grad():
        logits = half(input_ids=tokens[:8], use_cache=False).logits
    log_p, log_q = log_probabilities(tiny_qwen2, tokens[:8]), logits.double().log_softmax(-1)[:, :-1]
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert (noise.windows, noise.missing) == (8, None) and noise.kl is not None and noise.top1 is not None
    assert 1e-7 < expected < 1e-4 and noise.kl == pytest.approx(expected, rel=0.2)
    assert noise.top1 > 0.99


def test_a_model_that_overflows_in_float16_has_no_noise_floor(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Its embedding and all that writes to the residual stream times 2^15: the same model in float32."""
    weights = load_file(tiny_qwen2 / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            weights[name] = weight.float() * 2.0**15
    shutil.copytree(tiny_qwen2, tmp_path / "loud")
    save_file(weights, tmp_path / "loud" / "model.safetensors", {"format": "pt"})
    result = evaluate_checkpoint(
        str(tmp_path / "loud"), SAMPLE_TEXT, str(tmp_path / "loud"), windows=2, length=32
    )
    assert result.quality.kl == 0 and result.noise is not None
    assert (result.noise.kl, result.noise.top1, result.noise.windows) == (None, None, 2)
    assert ("noise floor", "not measured: the model overflows in float16") in describe_evaluation(result)


def test_bits_and_noise_of_an_evaluation(quantize_model: Callable[..., Quantized], tiny_qwen2: Path) -> None:
    folder = quantize_model(tiny_qwen2, "w4-nearest").folder
    alone = evaluate_checkpoint(str(folder), SAMPLE_TEXT, None, windows=2, length=32)
    assert alone.bits == measure_stored_bits(open_checkpoint(folder)) and alone.noise is None
    assert alone.bits is not None and 4 < alone.bits.projections < alone.bits.whole < 16
    assert f"{alone.bits.whole:.2f} bits per weight" in dict(describe_evaluation(alone))["size"]
    plain = evaluate_checkpoint(str(tiny_qwen2), SAMPLE_TEXT, str(folder), windows=2, length=32)
    assert plain.bits is None and plain.noise is not None and plain.noise.kl is not None
    assert "size" not in dict(describe_evaluation(plain))


# --- windows of a text --------------------------------------------------------------------------------


def test_windows_are_pieces_of_the_text(tiny_qwen2: Path, tokens: Tensor) -> None:
    ids = AutoTokenizer.from_pretrained(tiny_qwen2)(STORY, add_special_tokens=False)["input_ids"]
    assert tokens.shape == (5, 64) and tokens.dtype == torch.int64
    assert tokens[:, 0].tolist() == [8189] * 5
    starts = []
    for window in tokens[:, 1:].tolist():
        starts.append(next(i for i in range(len(ids)) if ids[i : i + 63] == window))
    assert starts[0] == 0


def test_windows_spread_over_the_text(tiny_qwen2: Path) -> None:
    """A text of numbers, where every place is unique."""

    class Words:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert add_special_tokens is False
            return {"input_ids": [int(word) for word in text.split()]}

    text = " ".join(map(str, range(1000)))
    windows = cut_windows(text, Words(), 7777, count=4, length=101)
    assert windows[:, 0].tolist() == [7777] * 4
    assert windows[:, 1].tolist() == [0, 200, 400, 600]
    assert all(window[1:].diff().eq(1).all() for window in windows)
    assert cut_windows(text, Words(), 7777, count=50, length=101).shape == (10, 101)
    assert cut_windows(text, Words(), 7777, count=1, length=1001).tolist() == [[7777, *range(1000)]]
    with pytest.raises(UsageError, match="1000 tokens, one window needs 1001"):
        cut_windows(text, Words(), 7777, count=1, length=1002)
