"""The tokens that calibration runs on: from a text, from ids, from WikiText-2, or from the model itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.calibration.sample import sample_windows
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.source import has_tokenizer
from anequant.errors import InputError, ResourceError, UsageError
from anequant.jobs.control import Progress, silent
from anequant.recipe import Calibration
from anequant.reference.sources import Ids, Texts, has_rows, read_source
from anequant.reference.windows import (
    load_tokenizer,
    require_known,
    start_token,
    text_windows,
)

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
    content = None if source in (SELF, WIKITEXT2) else _read_file(source)
    if isinstance(content, list):
        return _listed_windows(Path(source), content, checkpoint, count, length)
    tokenizer, first = _start(checkpoint, source)
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
    text = wikitext2("train") if content is None else content.written_out(tokenizer)
    windows = text_windows(text, tokenizer, first, count=count, length=length, seed=calibration.seed)
    require_known(windows.flatten().tolist(), checkpoint.spec.vocab_size)
    return windows


def check_calibration(calibration: Calibration, checkpoint: Checkpoint) -> None:
    """Refuse what `calibration_tokens` would, but for what is known only of texts that are yet to be written
    or fetched."""
    if calibration.source in (SELF, WIKITEXT2):
        _start(checkpoint, calibration.source)
    else:
        calibration_tokens(calibration, checkpoint)


def _start(checkpoint: Checkpoint, source: str) -> tuple[Any, int]:
    """The model's tokenizer, None without one, and the token that its texts start with."""
    config, tokenizer = checkpoint.spec.config, None
    if has_tokenizer(checkpoint.folder):
        tokenizer = load_tokenizer(checkpoint.folder)
        first = start_token(tokenizer, config)
    elif source == SELF:
        first = config["bos_token_id"] if isinstance(config.get("bos_token_id"), int) else 0
    else:
        raise InputError(
            f"'{checkpoint.folder}' has no tokenizer to read '{source}' with",
            remedy="calibrate on token ids (a .json or .jsonl file) or on 'self'",
        )
    require_known([first], checkpoint.spec.vocab_size)
    return tokenizer, first


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


def _read_file(source: str) -> Texts | list[Ids]:
    path = Path(source)
    if not has_rows(path) and not os.path.exists(path):
        raise UsageError(
            f"calibration source '{source}' does not exist",
            remedy=f"use {SELF}, {WIKITEXT2}, a text file, or a .json or .jsonl file",
        )
    return read_source(path)


def _listed_windows(path: Path, rows: list[Ids], checkpoint: Checkpoint, count: int, length: int) -> Tensor:
    """Windows from the rows of a file of token ids, as they stand."""
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
