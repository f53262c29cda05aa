"""Where calibration tokens come from, and what a bad source is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from anequant.calibration.saved import whole_calibration
from anequant.calibration.tokens import calibration_tokens
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.errors import InputError, ResourceError, UsageError
from anequant.recipe import Calibration

START = 8189


@pytest.fixture(scope="module")
def tiny(tiny_qwen2: Path) -> Checkpoint:
    return open_checkpoint(tiny_qwen2)


@pytest.fixture
def bare(make_model: Callable[..., Path], tmp_path: Path) -> Checkpoint:
    """A model of 97 tokens without a tokenizer."""
    return open_checkpoint(make_model(tmp_path / "bare", "qwen2", False, bos_token_id=5))


def windows(checkpoint: Checkpoint, source: object, samples: int, length: int, seed: int = 0) -> Tensor:
    return calibration_tokens(Calibration(str(source), samples, length, seed), checkpoint)


# --- a text -------------------------------------------------------------------------------------------


def assert_pieces(tokens: Tensor, checkpoint: Checkpoint, text: str) -> None:
    """Each window is the start token, then consecutive tokens of the text."""
    ids = AutoTokenizer.from_pretrained(checkpoint.folder)(text, add_special_tokens=False)["input_ids"]
    for first, *rest in tokens.tolist():
        assert first == START
        assert any(ids[i : i + len(rest)] == rest for i in range(len(ids)))


def test_a_text_file(tiny: Checkpoint) -> None:
    tokens = windows(tiny, SAMPLE_TEXT, 4, 64)
    assert tokens.shape == (4, 64) and tokens.dtype == torch.int64
    assert_pieces(tokens, tiny, SAMPLE_TEXT.read_text())


def test_the_seed_chooses_other_windows(tiny: Checkpoint) -> None:
    first, again, other = (windows(tiny, SAMPLE_TEXT, 4, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert other.shape == first.shape and (other != first)[:, 1:].any(1).all()
    assert_pieces(other, tiny, SAMPLE_TEXT.read_text())


def test_a_short_text_yields_what_it_holds(tiny: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(" ".join(SAMPLE_TEXT.read_text().split()[:200]))
    assert 1 <= len(windows(tiny, path, 1000, 64)) < 10
    path.write_text("Only this.")
    with pytest.raises(UsageError, match="one window needs 63"):
        windows(tiny, path, 4, 64)


def test_wikitext2(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    rows = ["", " = Title = \n", *(f"Line {i} of the train split. " for i in range(300))]

    def load_dataset(*args: str, **options: str) -> dict[str, list[str]]:
        asked.append((args, options))
        return {"text": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokens = windows(tiny, "wikitext2", 3, 32)
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"})]
    assert tokens.shape == (3, 32)
    assert_pieces(tokens, tiny, "\n".join(rows))


def test_wikitext2_without_a_network(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: str, **options: str) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ResourceError, match="WikiText-2") as caught:
        windows(tiny, "wikitext2", 3, 32)
    assert caught.value.exit_code == 5 and "self" in caught.value.remedy


def test_a_source_that_does_not_exist(tiny: Checkpoint) -> None:
    with pytest.raises(UsageError, match=r"'nowhere\.txt' does not exist") as caught:
        windows(tiny, "nowhere.txt", 3, 32)
    assert caught.value.exit_code == 2 and "wikitext2" in caught.value.remedy


def test_a_text_needs_a_tokenizer(bare: Checkpoint) -> None:
    with pytest.raises(InputError, match="no tokenizer") as caught:
        windows(bare, SAMPLE_TEXT, 3, 32)
    assert "self" in caught.value.remedy


# --- token ids ----------------------------------------------------------------------------------------

ROWS = [[5, *range(20)], [5, 1, 2], [5, *range(40, 70)]]
FORMS = {
    "lists": ROWS,
    "objects": [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ROWS],
    "columns": {"input_ids": ROWS},
}


@pytest.mark.parametrize("form", FORMS)
def test_token_ids(bare: Checkpoint, tmp_path: Path, form: str) -> None:
    """Cut to the length; the row that is too short is left out."""
    path = tmp_path / "calib.json"
    path.write_text(json.dumps(FORMS[form]))
    assert windows(bare, path, 9, 8).tolist() == [ROWS[0][:8], ROWS[2][:8]]
    assert windows(bare, path, 1, 8).tolist() == [ROWS[0][:8]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1, 2", "is not JSON"),
        ('{"tokens": [[1]]}', "no list of input_ids"),
        ("7", "no list of input_ids"),
        ("[[1, 2, 97]]", "entry 0 .* below 97"),
        ("[[1, 2], [1, -1]]", "entry 1 .* below 97"),
        ("[[true, false]]", "entry 0"),
        ("[[1.5, 2]]", "entry 0"),
        ('["words"]', "entry 0"),
        ("[[1]]", "no entry .* has 2 tokens"),
        ("[]", "no entry .* has 2 tokens"),
    ],
)
def test_bad_token_ids_are_refused(bare: Checkpoint, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "calib.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        windows(bare, path, 9, 2)
    assert caught.value.exit_code == 2 and "calib.json" in str(caught.value)


def test_token_ids_that_do_not_exist(bare: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json' cannot be read") as caught:
        windows(bare, tmp_path / "none.json", 9, 2)
    assert caught.value.exit_code == 2


# --- the model's own text -----------------------------------------------------------------------------


def test_own_samples_are_reproducible(bare: Checkpoint) -> None:
    first, again, other = (windows(bare, "self", 3, 24, seed) for seed in (0, 0, 1))
    assert first.shape == (3, 24) and first[:, 0].tolist() == [5] * 3
    assert torch.equal(first, again) and not torch.equal(first, other)


@torch.no_grad()
def test_own_samples_follow_the_models_distribution(bare: Checkpoint) -> None:
    count = 4000
    drawn = windows(bare, "self", count, 2)[:, 1].bincount(minlength=97) / count
    model = AutoModelForCausalLM.from_pretrained(bare.folder, dtype=torch.float32).eval()
    chances = model(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    noise = float((chances * (1 - chances) / count).sqrt().sum()) / 2
    assert float((drawn - chances).abs().sum()) / 2 < 1.3 * noise
    assert noise < 0.1


@torch.no_grad()
def test_own_samples_are_as_surprising_as_the_model_expects(tiny: Checkpoint) -> None:
    tokens = windows(tiny, "self", 8, 96)
    assert tokens[:, 0].tolist() == [START] * 8
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32).eval()
    log_p = model(tokens).logits[:, :-1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    surprise = -log_p.gather(-1, tokens[:, 1:, None]).mean()
    assert float(surprise) == pytest.approx(float(entropy), rel=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_a_files_own_sizes(tmp_path: Path, form: str) -> None:
    """All windows, cut to the shortest, whichever way the file holds them."""
    path = tmp_path / "calib.json"
    path.write_text(json.dumps(FORMS[form]))
    assert whole_calibration(str(path)) == Calibration(str(path), samples=3, length=3)
    assert whole_calibration("self") == Calibration("self")


@pytest.mark.parametrize("content", ["[]", "[[1, 2], 7]", "[[1, 2], [3]]", '{"tokens": [[1, 2]]}', "{"])
def test_a_file_without_sizes(tmp_path: Path, content: str) -> None:
    path = tmp_path / "calib.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"calib\.json"):
        whole_calibration(str(path))
