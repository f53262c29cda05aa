"""The tokens that calibration runs on: from a text, from ids, from WikiText-2, or from the model itself; and
written to a file of ids, a JSON list of {"input_ids": [...], "text": "..."} as ANEMLL's scripts have it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.calibration.sample import sample_windows
from anequant.checkpoints.reader import Checkpoint, read_config
from anequant.checkpoints.source import has_tokenizer
from anequant.errors import InputError, ResourceError, UsageError
from anequant.jobs.control import Progress, silent
from anequant.recipe import Calibration
from anequant.reference.sources import Ids, Texts, has_rows, read_source, read_source_text
from anequant.reference.windows import (
    cut_model_windows,
    cut_windows,
    find_start_token,
    load_tokenizer,
    require_known,
)

SELF, WIKITEXT2 = "self", "wikitext2"
WIKITEXT2_DATASET = ("Salesforce/wikitext", "wikitext-2-raw-v1")
PREVIEW = 500
"""Characters of a window's text that are written beside its tokens."""


def read_calibration_tokens(
    calibration: Calibration, checkpoint: Checkpoint, progress: Progress = silent, *, resident: bool = True
) -> Tensor:
    """Return token windows int64 [samples, length], each starting with the model's start token.

    Unless it is `resident`, a model that writes them is read again for every token.
    A text shorter than asked yields as many whole windows as it holds; raises UsageError when a source
    does not exist or holds too little, ResourceError when WikiText-2 cannot be had.
    """
    count, length, source = calibration.samples, calibration.length, calibration.source
    content = None if source in (SELF, WIKITEXT2) else _read_file(source)
    if isinstance(content, list):
        return _cut_listed_windows(Path(source), content, checkpoint, count, length)
    tokenizer, first = _start(checkpoint, source)
    if source == SELF:
        return sample_windows(checkpoint, first, calibration, resident=resident, progress=progress)
    text = read_wikitext2("train") if content is None else content.write_out(tokenizer)
    windows = cut_windows(text, tokenizer, first, count=count, length=length, seed=calibration.seed)
    require_known(windows.flatten().tolist(), checkpoint.spec.vocab_size)
    return windows


def check_calibration(calibration: Calibration, checkpoint: Checkpoint) -> None:
    """Refuse what `read_calibration_tokens` would, but for what is known only of texts that are yet to be
    written or fetched."""
    if calibration.source in (SELF, WIKITEXT2):
        _start(checkpoint, calibration.source)
    else:
        read_calibration_tokens(calibration, checkpoint)


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
        return Calibration(source)
    lengths = [len(row) for row in rows]
    if min(lengths, default=0) < 2:
        raise UsageError(f"calibration file '{source}' holds no windows of two tokens or more")
    return Calibration(source, samples=len(lengths), length=min(lengths))


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


def _read_file(source: str) -> Texts | list[Ids]:
    path = Path(source)
    if not has_rows(path) and not os.path.exists(path):
        raise UsageError(
            f"calibration source '{source}' does not exist",
            remedy=f"use {SELF}, {WIKITEXT2}, a text file, or a .json or .jsonl file",
        )
    return read_source(path)


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
