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

from anequant.calibration.tokens import calibrate_on_whole_file, read_calibration_tokens
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.errors import InputError, ResourceError, UsageError
from anequant.evaluation.evaluate import read_windows
from anequant.recipe import Calibration
from anequant.reference.windows import cut_windows

START = 8189


@pytest.fixture(scope="module")
def tiny(tiny_qwen2: Path) -> Checkpoint:
    return open_checkpoint(tiny_qwen2)


@pytest.fixture
def bare(make_model: Callable[..., Path], tmp_path: Path) -> Checkpoint:
    """A model of 97 tokens without a tokenizer."""
    return open_checkpoint(make_model(tmp_path / "bare", "qwen2", False, bos_token_id=5))


def windows(checkpoint: Checkpoint, source: object, samples: int, length: int, seed: int = 0) -> Tensor:
    return read_calibration_tokens(Calibration((str(source),), samples, length, seed), checkpoint)


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
FORMS: dict[str, Any] = {
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
        ("[[1, 2], [3, 4], 5]", "entry 2 .* no list of token ids"),
        ('[{"ids": [1, 2]}]', "entry 0 .* has the keys 'ids'"),
        ('[{"input_ids": "1 2"}]', "entry 0 .* no list of token ids"),
        ('[[1, 2], {"text": "a"}]', "entry 1 .* of another kind than entry 0"),
        ('{"input_ids": [[1, 2]], "attention_mask": []}', "1 rows of input_ids, and not as many of att"),
        ('{"input_ids": [[1, 2]], "attention_mask": 1}', "1 rows of input_ids, and not as many of att"),
        (
            '[{"input_ids": [1, 2], "attention_mask": [1]}]',
            "attention_mask of entry 0 .* of 2 zeros",
        ),
        ('[{"input_ids": [1, 2], "attention_mask": [1, true]}]', "attention_mask of entry 0"),
        ('[{"input_ids": [1, 2], "attention_mask": [1, 2]}]', "attention_mask of entry 0"),
        ('[{"input_ids": [1, 2], "attention_mask": "11"}]', "attention_mask of entry 0"),
        ('[{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}]', "entry 0 .* leaves out tokens between"),
        ('[{"input_ids": [1, 2], "attention_mask": [0, 0]}]', "no entry .* has 2 tokens"),
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


@pytest.mark.parametrize("name", ["calib.jsonl", "calib.JSONL", "calib.ndjson", "calib.JSON", "calib.json"])
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("form", ["lists", "objects"])
def test_token_ids_by_any_name(bare: Checkpoint, tmp_path: Path, name: str, lines: bool, form: str) -> None:
    """One row a line or a list of rows, whichever the name says."""
    path = tmp_path / name
    rows = FORMS[form]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows, indent=1))
    assert windows(bare, path, 9, 8).tolist() == [ROWS[0][:8], ROWS[2][:8]]
    assert calibrate_on_whole_file(str(path)) == Calibration((str(path),), samples=3, length=3)


@pytest.mark.parametrize("line", ["[5, 1, 2, 3]", '{"input_ids": [5, 1, 2, 3]}'])
def test_a_single_line_is_a_row(bare: Checkpoint, tmp_path: Path, line: str) -> None:
    path = tmp_path / "calib.jsonl"
    path.write_text(line)
    assert windows(bare, path, 9, 4).tolist() == [[5, 1, 2, 3]]


def test_a_line_that_is_no_json_is_named(bare: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "calib.jsonl"
    path.write_text("[1, 2]\n\n[1, 2\n")
    with pytest.raises(UsageError, match=r"calib\.jsonl' is not JSON: line 3"):
        windows(bare, path, 9, 2)


@pytest.mark.parametrize("form", ["objects", "columns"])
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 1), (0, 0)])
def test_padding_is_left_out(bare: Checkpoint, tmp_path: Path, form: str, left: int, right: int) -> None:
    """By the mask, not by the token: 0 is padding here and a token there."""
    padded = [[0] * left + row + [0] * right for row in ROWS]
    masks = [[0] * left + [1] * len(row) + [0] * right for row in ROWS]
    rows = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(padded, masks, strict=True)]
    path = tmp_path / "calib.json"
    path.write_text(json.dumps(rows if form == "objects" else {"input_ids": padded, "attention_mask": masks}))
    assert windows(bare, path, 9, 8).tolist() == [ROWS[0][:8], ROWS[2][:8]]
    assert calibrate_on_whole_file(str(path)) == Calibration((str(path),), samples=3, length=3)
    with pytest.raises(UsageError, match=r"no entry .* has 32 tokens"):
        windows(bare, path, 9, 32)


# --- rows of text -------------------------------------------------------------------------------------

STORIES = [part.strip() for part in SAMPLE_TEXT.read_text().split("\n\n")[:12]]
TEXT_ROWS: dict[str, Any] = {
    "strings": STORIES,
    "texts": [{"text": story, "meta": {"n": 1}} for story in STORIES],
    "prompts": [{"prompt": story} for story in STORIES],
    "completions": [{"prompt": story[:9], "completion": story[9:]} for story in STORIES],
    "column": {"text": STORIES},
}


@pytest.mark.parametrize("form", TEXT_ROWS)
def test_rows_of_text_are_the_text(tiny: Checkpoint, tmp_path: Path, form: str) -> None:
    """Calibration and evaluation: the windows of all rows, an empty line between them."""
    plain, listed, lines = (tmp_path / name for name in ("text.txt", "rows.json", "rows.JSONL"))
    plain.write_text("\n\n".join(STORIES))
    listed.write_text(json.dumps(TEXT_ROWS[form]))
    rows = TEXT_ROWS["texts"] if form == "column" else TEXT_ROWS[form]
    lines.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    expected = windows(tiny, plain, 4, 32)
    assert len(expected) == 4
    for path in (listed, lines):
        assert torch.equal(windows(tiny, path, 4, 32), expected)
        assert torch.equal(read_windows(tiny, path, 4, 32), expected)
        assert calibrate_on_whole_file(str(path)) == Calibration((str(path),))


@pytest.fixture
def chatty(tiny_qwen2: Path, tmp_path: Path) -> Checkpoint:
    """The bundled model with a template that writes the token that starts a text."""
    folder = tmp_path / "chatty"
    folder.mkdir()
    for path in tiny_qwen2.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(
        "{{ eos_token }}{% for m in messages %}"
        "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    return open_checkpoint(folder)


@pytest.mark.parametrize("form", ["messages", "list", "prompt and completion"])
def test_conversations_are_what_the_template_writes(chatty: Checkpoint, tmp_path: Path, form: str) -> None:
    talks = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": two}]
        for one, two in zip(STORIES[::2], STORIES[1::2], strict=False)
    ]
    rows: Any = {
        "messages": [{"messages": talk} for talk in talks],
        "list": talks,
        "prompt and completion": [{"prompt": talk[:1], "completion": talk[1:]} for talk in talks],
    }[form]
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = AutoTokenizer.from_pretrained(chatty.folder)
    ids = [token for talk in talks for token in tokenizer.apply_chat_template(talk)["input_ids"]]
    tokens = windows(chatty, path, 4, 32)
    assert tokens[0].tolist() == ids[:32] and ids[0] == START
    assert all(any(ids[i : i + 31] == row[1:] for i in range(len(ids))) for row in tokens.tolist())
    assert (tokens[:, 0] == START).all() and not (tokens[:, 1] == START).any()


def test_conversations_that_cannot_be_written(tiny: Checkpoint, chatty: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    talk = [{"role": "user", "content": "a"}]
    path.write_text(json.dumps([{"messages": talk}, {"messages": [{"role": "tool", "content": "b"}]}]))
    with pytest.raises(UsageError, match=r"talks\.json' holds conversations, .* no chat template") as caught:
        windows(tiny, path, 4, 32)
    assert '{"text": "..."}' in caught.value.remedy
    with pytest.raises(UsageError, match=r"template refuses entry 1 of .*talks\.json': no tools here"):
        windows(chatty, path, 4, 32)
    path.write_text(json.dumps([{"messages": [{"role": "user", "content": ["a"]}]}]))
    with pytest.raises(UsageError, match=r"entry 0 .* no conversation"):
        windows(chatty, path, 4, 32)


# --- the token that starts a text ---------------------------------------------------------------------


def test_no_window_starts_twice(tiny: Checkpoint, tmp_path: Path) -> None:
    """Neither by a start that the text spells, nor by a separator where a window begins."""
    plain, spelled, cut = tmp_path / "plain.txt", tmp_path / "spelled.txt", tmp_path / "cut.txt"
    text = SAMPLE_TEXT.read_text()[:4000]
    plain.write_text(text)
    spelled.write_text("<|endoftext|><|endoftext|>" + text)
    assert torch.equal(windows(tiny, spelled, 4, 32), windows(tiny, plain, 4, 32))
    assert torch.equal(read_windows(tiny, spelled, 4, 32), read_windows(tiny, plain, 4, 32))
    cut.write_text("<|endoftext|>".join(text.split()))
    for seed in range(6):
        tokens = windows(tiny, cut, 20, 16, seed)
        assert tokens.shape == (20, 16) and (tokens[:, 0] == START).all()
        assert not (tokens[:, 1] == START).any() and (tokens[:, 2:] == START).any()


def test_a_tokenizer_that_always_adds_the_start() -> None:
    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [5, *map(ord, text)]}

    assert cut_windows("abcdef", tokenizer, 5, count=1, length=4).tolist() == [[5, 97, 98, 99]]
    with pytest.raises(UsageError, match="the text has 0 tokens"):
        cut_windows("", tokenizer, 5, count=1, length=4)


# --- what is no text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1", "a table of columns by its name"),
        ("a.arrow", b"ARROW1", "a table of columns"),
        ("a.CSV", b"text\nwords", "a table of cells"),
        ("a.json.gz", b"\x1f\x8b", "a compressed file"),
        ("a.pt", b"PK", "a pickle, which is never opened"),
        ("a.dat", b"words\0words", "holds NUL, as binary files do"),
        ("a.txt", b"\xff\xfe", "byte 0xff at 0 is no UTF-8"),
        ("rows.txt", b"[[1, 2], [3, 4]]", "holds JSON"),
        ("rows", b'{"text": "a"}\n{"text": "b"}', "holds JSON"),
        ("rows.txt", b'{"input_ids": [\n[1, 2]]}', "holds JSON"),
        ("folder", None, "is a folder"),
        ("folder.json", None, "is a folder"),
    ],
)
def test_what_is_no_text_is_named(
    tiny: Checkpoint, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    for read in (windows, read_windows):
        with pytest.raises(UsageError, match=message) as caught:
            read(tiny, path, 2, 8)
        assert name in str(caught.value) and caught.value.exit_code == 2
        assert caught.value.remedy or "cannot be read" in caught.value.what


def test_a_text_may_begin_with_a_bracket(tiny: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("[1]\n" + SAMPLE_TEXT.read_text()[:2000])
    assert windows(tiny, path, 2, 16).shape == (2, 16)


def test_an_evaluation_is_no_matter_of_ids(tiny: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(ROWS))
    with pytest.raises(UsageError, match=r"ids\.json' holds token ids where a text is due") as caught:
        read_windows(tiny, path, 2, 8)
    assert "text" in caught.value.remedy


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
    """Behind their openings, which are at most a quarter."""
    tokens = windows(tiny, "self", 8, 96)
    assert tokens[:, 0].tolist() == [START] * 8
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32).eval()
    log_p = model(tokens).logits[:, :-1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[:, 24:].mean()
    surprise = -log_p.gather(-1, tokens[:, 1:, None])[:, 24:].mean()
    assert float(surprise) == pytest.approx(float(entropy), rel=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_a_files_own_sizes(tmp_path: Path, form: str) -> None:
    """All windows, cut to the shortest, whichever way the file holds them."""
    path = tmp_path / "calib.json"
    path.write_text(json.dumps(FORMS[form]))
    assert calibrate_on_whole_file(str(path)) == Calibration((str(path),), samples=3, length=3)
    assert calibrate_on_whole_file("self") == Calibration(("self",))


@pytest.mark.parametrize("content", ["[]", "[[1, 2], 7]", "[[1, 2], [3]]", '{"tokens": [[1, 2]]}', "{"])
def test_a_file_without_sizes(tmp_path: Path, content: str) -> None:
    path = tmp_path / "calib.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"calib\.json"):
        calibrate_on_whole_file(str(path))
