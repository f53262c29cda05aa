"""Texts that a model writes: what is drawn, how texts fill windows, and what a cache holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from anequant.calibration import sample
from anequant.calibration.sample import sample_windows, split_windows
from anequant.calibration.surprise import draw_tokens
from anequant.calibration.tokens import read_openings
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import OPENINGS
from anequant.errors import InputError
from anequant.recipe import Calibration


@pytest.fixture
def tiny(tiny_qwen2: Path) -> Checkpoint:
    return open_checkpoint(tiny_qwen2)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- a token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 97, 256, 257, 700, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_where_the_sum_of_chances_passes_a_share(vocab: int, dtype: torch.dtype) -> None:
    """In numpy, over all chances in float64."""
    logits = (4 * torch.randn(200, vocab, generator=seeded(1))).to(dtype)
    shares = torch.rand(200, 1, generator=seeded(), dtype=torch.float64).numpy()
    values = logits.double().numpy()
    chances = np.exp(values - values.max(1, keepdims=True))
    passed = np.cumsum(chances, 1) > shares * chances.sum(1, keepdims=True)
    drawn = draw_tokens(logits, seeded())
    assert drawn is not None and drawn.tolist() == passed.argmax(1).tolist()


def test_what_cannot_be_is_never_drawn() -> None:
    """Neither a token without a chance nor one behind the vocabulary, wherever the share falls."""
    logits = torch.full((4096, 300), -math.inf)
    logits[:, [0, 255, 256, 290]] = torch.tensor([0.0, -1.0, 1.0, 0.5])
    drawn = draw_tokens(logits, seeded())
    assert drawn is not None
    counts = drawn.bincount(minlength=300) / 4096
    assert counts[[0, 255, 256, 290]].sum() == 1
    expected = torch.tensor([0.0, -1.0, 1.0, 0.5]).softmax(0)
    assert torch.allclose(counts[[0, 255, 256, 290]], expected, atol=0.03)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_no_token(value: float) -> None:
    logits = torch.zeros(3, 300)
    logits[1, 7] = value
    assert draw_tokens(logits, seeded()) is None


# --- texts and windows --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "texts", "each"), [(2, 1, 2), (128, 1, 128), (129, 2, 65), (300, 3, 100), (512, 4, 128)]
)
def test_a_window_is_filled_by_texts(length: int, texts: int, each: int) -> None:
    assert split_windows(5, length) == (5 * texts, each)


def test_texts_are_those_of_the_model_one_by_one(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each begins anew, in as many batches as it takes: every token is the one that its share draws from what
    stock transformers says of the text up to it, without a cache."""
    monkeypatch.setattr(sample, "TEXT_LENGTH", 12)
    monkeypatch.setattr(sample, "TEXTS_AT_ONCE", 4)
    monkeypatch.setattr(sample, "has_bfloat16", lambda: False)
    checkpoint = open_checkpoint(make_model(tmp_path / "model", "qwen2", False, vocab_size=600))
    windows = sample_windows(checkpoint, [[7]], Calibration(samples=3, length=22, seed=5))
    assert windows.shape == (3, 22) and (windows[:, [0, 11]] == 7).all()
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    generator = seeded(5)
    for texts in torch.split(windows.reshape(6, 11), 4):
        with torch.no_grad():
            logits = model(texts).logits
        for position in range(10):
            drawn = draw_tokens(logits[:, position], generator)
            assert drawn is not None and drawn.tolist() == texts[:, position + 1].tolist()


def test_texts_go_on_from_their_openings(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, a quarter of a text at most; what follows depends on them."""
    monkeypatch.setattr(sample, "TEXT_LENGTH", 16)
    openings = [[8189], [8189, 5, 6], [8189, *range(9)]]
    texts = sample_windows(tiny, openings, Calibration(samples=2, length=64)).reshape(8, 16)
    for number, text in enumerate(texts.tolist()):
        begun = openings[number % 3][:4]
        assert text[: len(begun)] == begun
    other = sample_windows(tiny, [[8189], [8189, 7, 6]], Calibration(samples=1, length=32)).reshape(2, 16)
    assert torch.equal(other[0], sample_windows(tiny, [[8189]], Calibration(samples=1, length=32))[0, :16])
    assert other[1, 3:].tolist() != texts[1, 3:].tolist()


def test_the_bundled_openings_are_tokens_after_one_start(tiny: Checkpoint) -> None:
    openings = read_openings(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    texts = [json.loads(line) for line in OPENINGS.read_text(encoding="utf-8").splitlines()]
    assert len(texts) == len(set(texts)) == len(openings) >= 24
    for text, ids in zip(texts, openings, strict=True):
        assert ids[0] == 8189 and 8189 not in ids[1:] and tokenizer.decode(ids[1:]) == text


def test_bfloat16_says_nearly_the_same(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has it: the texts' surprise is what float32 expects of its own."""
    surprises = []
    for fast in (False, True):
        monkeypatch.setattr(sample, "has_bfloat16", lambda fast=fast: fast)
        tokens = sample_windows(tiny, [[8189]], Calibration(samples=16, length=96))
        model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32).eval()
        with torch.no_grad():
            log_p = model(tokens).logits[:, :-1].log_softmax(-1)
        surprises.append(float(-log_p.gather(-1, tokens[:, 1:, None]).mean()))
    assert surprises[0] == pytest.approx(surprises[1], rel=0.05)


def test_logits_that_are_not_finite_are_told(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "draw_tokens", lambda logits, generator: None)
    with pytest.raises(InputError, match="logits are not finite when it writes token 1") as caught:
        sample_windows(tiny, [[1]], Calibration(samples=2, length=4))
    assert "damaged" in caught.value.remedy
