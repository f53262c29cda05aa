"""The tokens that calibration runs on: from a text, from ids, from WikiText-2, or from the model itself; and
written to a file of ids, a JSON list of {"input_ids": [...], "text": "..."} as ANEMLL's scripts have it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.calibration.sample import sample_windows
from anequant.calibration.shares import count_shares, mix_evenly
from anequant.checkpoints.reader import Checkpoint, read_config
from anequant.checkpoints.source import OPENINGS, has_tokenizer
from anequant.errors import InputError, ResourceError, UsageError
from anequant.jobs.control import Progress, silent
from anequant.recipe import Calibration
from anequant.reference.sources import Ids, Texts, has_rows, read_source, read_source_text
from anequant.reference.windows import (
    cut_model_windows,
    cut_windows,
    find_start_token,
    load_tokenizer,
    pack_windows,
    require_known,
)

SELF, WIKITEXT2 = "self", "wikitext2"
WIKITEXT2_DATASET = ("Salesforce/wikitext", "wikitext-2-raw-v1")
MOST_WRITTEN = 96
"""Fresh windows that a model writes itself, which takes its time."""

PREVIEW = 500
"""Characters of a window's text that are written beside its tokens."""


@dataclass(frozen=True)
class _Part:
    """What one source gives: its own calibration, and what its file holds, None for texts that are yet to be
    written or fetched; `shared`: beside others, so that it has to give all of its windows."""

    calibration: Calibration
    content: Texts | list[Ids] | None
    shared: bool

    @property
    def source(self) -> str:
        return self.calibration.sources[0]


def read_calibration_tokens(
    calibration: Calibration, checkpoint: Checkpoint, progress: Progress = silent, *, resident: bool = True
) -> Tensor:
    """Return token windows int64 [samples, length], each starting with the model's start token, those of
    several sources mixed evenly.

    Unless it is `resident`, a model that writes them is read again for every token.
    A single source that holds less than asked yields as many whole windows as it does, one of several has to
    hold its share; raises UsageError when a source does not exist or holds too little, ResourceError when
    WikiText-2 cannot be had.
    """
    return _mix([_read_windows(part, checkpoint, progress, resident) for part in _open_parts(calibration)])


def read_fresh_tokens(
    calibration: Calibration, checkpoint: Checkpoint, most: int, progress: Progress = silent
) -> Tensor:
    """Return at most `most` windows of the calibration's sources, drawn by another seed than its own and
    mixed evenly: int64 [n, length].

    Each source gives its share of them or what it holds, the model itself at most MOST_WRITTEN. Raises as
    `read_calibration_tokens`.
    """
    samples = max(most, len(calibration.sources))
    parts = _open_parts(replace(calibration, samples=samples, seed=calibration.seed + 1))
    return _mix([_read_windows(_ease(part), checkpoint, progress) for part in parts])


def _ease(part: _Part) -> _Part:
    """Return a part that may give fewer windows than its share."""
    own = part.calibration
    if part.source == SELF:
        own = replace(own, samples=min(own.samples, MOST_WRITTEN))
    return replace(part, calibration=own, shared=False)


def _mix(read: Sequence[Tensor]) -> Tensor:
    """Return the windows [n, length] of all sources, mixed evenly."""
    return torch.stack([read[source][window] for source, window in mix_evenly([len(part) for part in read])])


def check_calibration(calibration: Calibration, checkpoint: Checkpoint) -> None:
    """Refuse what `read_calibration_tokens` would, but for what is known only of texts that are yet to be
    written or fetched."""
    for part in _open_parts(calibration):
        if part.source == SELF:
            read_openings(checkpoint)
        elif part.content is None:
            _start(checkpoint, part.source)
        else:
            _read_windows(part, checkpoint)


def save_calibration(output: Path, model: Path, source: str, *, count: int, length: int) -> int:
    """Write `count` windows of `source`, a text file or wikitext2, by the tokenizer in the folder `model`.

    Each comes with the beginning of its text. Returns the number of windows, less than `count` when the
    text holds less. Raises UsageError for a text that cannot be read or holds no window, InputError
    without a tokenizer, ResourceError when WikiText-2 cannot be had or the file not be written.
    """
    tokenizer = load_tokenizer(model)
    text = read_wikitext2("train") if source == WIKITEXT2 else read_source_text(Path(source), tokenizer)
    windows = cut_model_windows(tokenizer, read_config(model), text, count=count, length=length)
    rows = [
        {"input_ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)[:PREVIEW]}
        for ids in windows.tolist()
    ]
    try:
        output.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"'{output}' cannot be written: {error.strerror}") from error
    return len(rows)


def calibrate_on_whole_file(source: str) -> Calibration:
    """Return the Calibration that sees all rows of a file of token ids, cut to the shortest; the default
    sizes for any other source.

    Raises UsageError for a JSON file that is not understood or holds no windows.
    """
    rows = read_source(Path(source)) if has_rows(Path(source)) else None
    if not isinstance(rows, list):
        return Calibration((source,))
    lengths = [len(row) for row in rows]
    if min(lengths, default=0) < 2:
        raise UsageError(f"calibration file '{source}' holds no windows of two tokens or more")
    return Calibration((source,), samples=len(lengths), length=min(lengths))


def read_openings(checkpoint: Checkpoint) -> list[list[int]]:
    """Return the bundled openings of texts as the model's tokens, each after the token that starts a text.

    A model without a tokenizer has that token alone. Raises InputError for tokens that the model does not
    know.
    """
    tokenizer, first = _start(checkpoint, SELF)
    if tokenizer is None:
        return [[first]]
    texts = read_source(OPENINGS)
    assert isinstance(texts, Texts)
    written = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts.parts]
    openings = [[first, *(token for token in ids if token != first)] for ids in written]
    require_known([token for ids in openings for token in ids], checkpoint.spec.vocab_size)
    return openings


def _start(checkpoint: Checkpoint, source: str) -> tuple[Any, int]:
    """Return the model's tokenizer, None without one, and the token that its texts start with."""
    config, tokenizer = checkpoint.spec.config, None
    if has_tokenizer(checkpoint.folder):
        tokenizer = load_tokenizer(checkpoint.folder)
        first = find_start_token(tokenizer, config)
    elif source == SELF:
        first = config["bos_token_id"] if isinstance(config.get("bos_token_id"), int) else 0
    else:
        raise InputError(
            f"'{checkpoint.folder}' has no tokenizer to read '{source}' with",
            remedy="calibrate on token ids (a .json or .jsonl file) or on 'self'",
        )
    require_known([first], checkpoint.spec.vocab_size)
    return tokenizer, first


def read_wikitext2(split: str) -> str:
    """Return a split of WikiText-2 (Merity et al. 2016) through `datasets`, from the network or its cache."""
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(*WIKITEXT2_DATASET, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ResourceError(
            "WikiText-2 is neither in the cache of `datasets` nor to be had from the hub",
            remedy="name a text file; calibration can do with 'self'",
        ) from error
    return "\n".join(rows["text"])


def _open_parts(calibration: Calibration) -> list[_Part]:
    """Read the files of all sources; raises UsageError for one that cannot be read or is not understood, and
    for conversations that are asked for and nowhere."""
    shared = len(calibration.sources) > 1
    parts = []
    for source, share in zip(calibration.sources, count_shares(calibration), strict=True):
        alone = replace(calibration, sources=(source,), weights=(), samples=share)
        written = source in (SELF, WIKITEXT2)
        parts.append(_Part(alone, None if written else _read_file(source, chat=calibration.chat), shared))
    if calibration.chat and not any(isinstance(p.content, Texts) and p.content.conversations for p in parts):
        raise UsageError(
            "no calibration source holds conversations, which --calib-chat is for",
            remedy='name rows of {"messages": [...]} or {"prompt": "...", "completion": "..."}',
        )
    return parts


def _read_windows(
    part: _Part, checkpoint: Checkpoint, progress: Progress = silent, resident: bool = True
) -> Tensor:
    """Return the windows of one source; raises as `read_calibration_tokens`."""
    own, content = part.calibration, part.content
    if isinstance(content, list):
        windows = _cut_listed_windows(Path(part.source), content, checkpoint, own.samples, own.length)
    elif part.source == SELF:
        openings = read_openings(checkpoint)
        windows = sample_windows(checkpoint, openings, own, resident=resident, progress=progress)
    else:
        windows = _cut_texts(own, content, checkpoint)
    if part.shared and len(windows) < own.samples:
        raise UsageError(
            f"'{part.source}' has {len(windows)} windows of {own.length} tokens, its share is {own.samples}",
            remedy="lower --calib-samples or its weight, or name more text",
        )
    return windows


def _cut_texts(own: Calibration, content: Texts | None, checkpoint: Checkpoint) -> Tensor:
    """Return windows of a file's text or conversations; of WikiText-2 where there is no file."""
    tokenizer, first = _start(checkpoint, own.sources[0])
    sizes = {"count": own.samples, "length": own.length, "seed": own.seed}
    if content is not None and own.chat and content.conversations:
        windows = pack_windows(content.write_conversations(tokenizer), tokenizer, first, **sizes)
    else:
        text = read_wikitext2("train") if content is None else content.write_out(tokenizer)
        windows = cut_windows(text, tokenizer, first, **sizes)
    require_known(windows.flatten().tolist(), checkpoint.spec.vocab_size)
    return windows


def _read_file(source: str, *, chat: bool) -> Texts | list[Ids]:
    path = Path(source)
    if not has_rows(path) and not os.path.exists(path):
        raise UsageError(
            f"calibration source '{source}' does not exist",
            remedy=f"use {SELF}, {WIKITEXT2}, a text file, or a .json or .jsonl file",
        )
    return read_source(path, chat=chat)


def _cut_listed_windows(
    path: Path, rows: list[Ids], checkpoint: Checkpoint, count: int, length: int
) -> Tensor:
    """Return windows from the rows of a file of token ids, as they stand."""
    vocab = checkpoint.spec.vocab_size
    windows = []
    for number, ids in enumerate(rows):
        if not all(type(token) is int and 0 <= token < vocab for token in ids):
            raise UsageError(f"entry {number} of '{path}' is no list of token ids below {vocab}")
        if len(ids) >= length:
            windows.append(ids[:length])
    if not windows:
        raise UsageError(f"no entry of '{path}' has {length} tokens", remedy="lower --calib-length")
    windows = windows[:count]
    if length > 2 and all(len(set(window[1:])) == 1 for window in windows):
        raise UsageError(f"every entry of '{path}' repeats a single token", remedy="leave out the padding")
    return torch.tensor(windows)
