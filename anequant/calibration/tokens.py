"""The tokens that calibration runs on: from a text, from ids, from WikiText-2, or from the model itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.calibration.sample import sample_windows
from anequant.calibration.text import (
    load_tokenizer,
    read_text,
    require_known,
    start_token,
    text_windows,
)
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.source import has_tokenizer
from anequant.errors import InputError, ResourceError, UsageError
from anequant.progress import Progress, silent
from anequant.recipe import Calibration
from anequant.strict import parse_json

SELF, WIKITEXT2 = "self", "wikitext2"
WIKITEXT2_DATASET = ("Salesforce/wikitext", "wikitext-2-raw-v1")


def calibration_tokens(
    calibration: Calibration, checkpoint: Checkpoint, progress: Progress = silent, *, resident: bool = True
) -> Tensor:
    """Token windows int64 [samples, length], each starting with the model's start token.

    Unless it is `resident`, a model that writes them is read again for every token.
    A text shorter than asked yields as many whole windows as it holds; raises UsageError when a source
    does not exist or holds too little, ResourceError when WikiText-2 cannot be had.
    """
    count, length, source = calibration.samples, calibration.length, calibration.source
    if source != SELF and source.endswith(".json"):
        return _listed_windows(Path(source), checkpoint, count, length)
    text = _existing_text(source) if source not in (SELF, WIKITEXT2) else ""
    if not has_tokenizer(checkpoint.folder):
        if source != SELF:
            raise InputError(
                f"'{checkpoint.folder}' has no tokenizer to read '{source}' with",
                remedy="calibrate on token ids (a .json file) or on 'self'",
            )
        first = checkpoint.spec.config.get("bos_token_id")
        first = first if isinstance(first, int) else 0
    else:
        tokenizer = load_tokenizer(checkpoint.folder)
        first = start_token(tokenizer, checkpoint.spec.config)
    if not 0 <= first < checkpoint.spec.vocab_size:
        raise InputError(
            f"a text starts with token {first}, the vocabulary has {checkpoint.spec.vocab_size}",
            where=str(checkpoint.folder),
        )
    if source == SELF:
        return sample_windows(
            checkpoint,
            first,
            count=count,
            length=length,
            seed=calibration.seed,
            resident=resident,
            progress=progress,
        )
    text = wikitext2("train") if source == WIKITEXT2 else text
    windows = text_windows(text, tokenizer, first, count=count, length=length, seed=calibration.seed)
    require_known(windows, checkpoint.spec.vocab_size)
    return windows


def wikitext2(split: str) -> str:
    """A split of WikiText-2 (Merity et al. 2016) through `datasets`, from the network or its cache."""
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(*WIKITEXT2_DATASET, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ResourceError(
            "WikiText-2 is neither in the cache of `datasets` nor to be had from the hub",
            remedy="name a text file; calibration can do with 'self'",
        ) from error
    return "\n".join(rows["text"])


def _existing_text(source: str) -> str:
    if not os.path.isfile(source):
        raise UsageError(
            f"calibration source '{source}' does not exist",
            remedy=f"use {SELF}, {WIKITEXT2}, a text file, or a .json file of token ids",
        )
    return read_text(Path(source))


def listed_rows(path: Path) -> list[Any]:
    """The lists of token ids in a JSON file: a list of `input_ids` lists, of objects with that key, or an
    object whose `input_ids` is such a list. Their content is not checked.

    Raises UsageError for a file that holds none of these.
    """
    try:
        rows = parse_json(read_text(path))
    except ValueError as error:
        raise UsageError(f"calibration file '{path}' is not JSON: {error}") from error
    if isinstance(rows, dict):
        rows = rows.get("input_ids")
    if not isinstance(rows, list):
        raise UsageError(f"calibration file '{path}' holds no list of input_ids")
    return [row.get("input_ids") if isinstance(row, dict) else row for row in rows]


def _listed_windows(path: Path, checkpoint: Checkpoint, count: int, length: int) -> Tensor:
    """Windows from a JSON file of token ids, as they stand."""
    vocab = checkpoint.spec.vocab_size
    windows = []
    for number, ids in enumerate(listed_rows(path)):
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab for token in ids):
            raise UsageError(f"entry {number} of '{path}' is no list of token ids below {vocab}")
        if len(ids) >= length:
            windows.append(ids[:length])
    if not windows:
        raise UsageError(f"no entry of '{path}' has {length} tokens", remedy="lower --calib-length")
    windows = windows[:count]
    if length > 2 and all(len(set(window[1:])) == 1 for window in windows):
        raise UsageError(f"every entry of '{path}' repeats a single token", remedy="leave out the padding")
    return torch.tensor(windows)
