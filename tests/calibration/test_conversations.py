"""Conversations of JSON rows, which begin windows as a chat begins, with one token that starts a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import invoke
from torch import Tensor
from transformers import AutoTokenizer

from anequant.calibration.tokens import check_calibration, read_calibration_tokens
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.errors import UsageError
from anequant.recipe import Calibration
from anequant.reference.windows import pack_windows

START = 8189
STORIES = [part.strip() for part in SAMPLE_TEXT.read_text().split("\n\n")[:12]]
TALKS = [
    [{"role": "user", "content": one}, {"role": "assistant", "content": two}]
    for one, two in zip(STORIES[::2], STORIES[1::2], strict=False)
]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
ROWS: dict[str, list[Any]] = {
    "messages": [{"messages": talk} for talk in TALKS],
    "lists": list(TALKS),
    "texts": [{"prompt": one["content"], "completion": two["content"]} for one, two in TALKS],
    "parts": [{"prompt": talk[:1], "completion": talk[1:]} for talk in TALKS],
}
"""The same conversations, in every form that a row may have."""


def with_template(folder: Path, model: Path, template: str) -> Checkpoint:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(template)
    return open_checkpoint(folder)


@pytest.fixture(params=["", "{{ eos_token }}", "{{ eos_token }}{{ eos_token }}"])
def chatty(request: pytest.FixtureRequest, tiny_qwen2: Path, tmp_path: Path) -> Checkpoint:
    """The bundled model with a template that writes the start token not at all, once or twice."""
    return with_template(tmp_path / "chatty", tiny_qwen2, request.param + TEMPLATE)


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def windows(
    checkpoint: Checkpoint, *sources: str, samples: int = 40, length: int = 32, seed: int = 0
) -> Tensor:
    calibration = Calibration(sources, samples, length, seed, chat=True)
    check_calibration(calibration, checkpoint)
    return read_calibration_tokens(calibration, checkpoint)


def talk_ids(checkpoint: Checkpoint) -> list[list[int]]:
    """Every conversation as transformers writes it out, without what starts a text."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    written = [tokenizer.apply_chat_template(talk)["input_ids"] for talk in TALKS]
    return [[token for token in ids if token != START] for ids in written]


@pytest.mark.parametrize("form", ROWS)
def test_windows_begin_with_conversations(chatty: Checkpoint, tmp_path: Path, form: str) -> None:
    """Each of these is longer than a window, so each gives the window that it begins."""
    source = write_rows(tmp_path / "talks.jsonl", ROWS[form])
    talks = talk_ids(chatty)
    assert min(map(len, talks)) >= 31
    assert windows(chatty, source).tolist() == [[START, *ids[:31]] for ids in talks]


def test_a_prompt_alone_is_the_users(chatty: Checkpoint, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "talks.jsonl", [{"prompt": STORIES[0]}])
    ids = AutoTokenizer.from_pretrained(chatty.folder).apply_chat_template(TALKS[0][:1])["input_ids"]
    assert windows(chatty, source, length=16)[0, 1:].tolist() == [i for i in ids if i != START][:15]


def test_without_the_option_they_are_one_running_text(chatty: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    running = Calibration((write_rows(path, ROWS["messages"]),), 40, 32)
    assert len(read_calibration_tokens(running, chatty)) > len(windows(chatty, str(path)))
    plain = Calibration((write_rows(path, ROWS["texts"]),), 40, 32)
    text = tmp_path / "plain.txt"
    text.write_text("\n\n".join(one["content"] + two["content"] for one, two in TALKS))
    expected = read_calibration_tokens(Calibration((str(text),), 40, 32), chatty)
    assert torch.equal(read_calibration_tokens(plain, chatty), expected)


def test_prose_and_ids_beside_conversations_stay_what_they_are(chatty: Checkpoint, tmp_path: Path) -> None:
    talks, ids = write_rows(tmp_path / "talks.jsonl", ROWS["texts"]), tmp_path / "ids.json"
    ids.write_text(json.dumps([list(range(32))] * 4))
    mixed = windows(chatty, talks, str(SAMPLE_TEXT), str(ids), samples=12).tolist()
    for source, chat in ((talks, True), (str(SAMPLE_TEXT), False), (str(ids), False)):
        alone = read_calibration_tokens(Calibration((source,), 4, 32, chat=chat), chatty).tolist()
        assert len(alone) == 4 and all(window in mixed for window in alone)


def test_what_holds_no_conversation_is_told(chatty: Checkpoint, tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": story} for story in STORIES])
    for sources in (("self",), (texts,), (str(SAMPLE_TEXT), "self"), ("wikitext2",)):
        with pytest.raises(UsageError, match="no calibration source holds conversations") as caught:
            windows(chatty, *sources)
        assert '{"messages": [...]}' in caught.value.remedy
    few = write_rows(tmp_path / "few.jsonl", ROWS["texts"][:1])
    with pytest.raises(UsageError, match=r"the conversations have .* tokens, one window needs 4096"):
        windows(chatty, few, length=4096)


def test_a_model_without_a_template_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """And nothing is left behind."""
    source, output = write_rows(tmp_path / "talks.jsonl", ROWS["texts"]), tmp_path / "out"
    result = invoke("quantize", tiny_qwen2, "-o", output, "--calib", source, "--calib-chat")
    assert result.exit_code == UsageError.exit_code and list(tmp_path.iterdir()) == [Path(source)]
    assert "talks.jsonl' holds conversations, and the tokenizer has no chat template" in result.stderr


# --- packing, against one that is written down ----------------------------------------------------------


class Numbers:
    """A tokenizer of texts that are numbers already."""

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=12)


@given(TEXTS, st.integers(2, 7), st.integers(1, 6), st.integers(0, 3))
def test_packed_windows_are_whole_beginnings(
    texts: list[list[int]], length: int, count: int, seed: int
) -> None:
    """0 starts a text. Every window starts with it once, then holds texts from their beginnings, in order;
    none is used twice, and no padding fills what is short."""
    every: list[list[int]] = []
    rest = list(texts)
    while rest:
        window: list[int] = []
        while rest and len(window) < length:
            ids = rest.pop(0)
            body = ids[next((n for n, token in enumerate(ids) if token), len(ids)) :]
            window += ([0] if not window or len(body) < len(ids) else []) + body
        if len(window) >= length:
            every.append(window[:length])
    written = [" ".join(map(str, ids)) for ids in texts]
    if not every:
        with pytest.raises(UsageError, match=f"one window needs {length}"):
            pack_windows(written, Numbers(), 0, count=count, length=length, seed=seed)
        return
    packed = pack_windows(written, Numbers(), 0, count=count, length=length, seed=seed).tolist()
    assert len(packed) == min(count, len(every)) and all(window[0] == 0 for window in packed)
    places = iter(every)
    assert all(any(window == other for other in places) for window in packed)
    if count >= len(every):
        assert packed == every
