"""Quality of a checkpoint on a text file."""

from __future__ import annotations

from pathlib import Path

from anequant.calibration.text import load_tokenizer, read_text, start_token, text_windows
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import resolve_source
from anequant.errors import InputError
from anequant.evaluation.divergence import Quality, evaluate
from anequant.progress import Progress, silent


def evaluate_text(
    model: str,
    text_file: Path,
    base: str | None,
    *,
    windows: int,
    length: int,
    progress: Progress = silent,
) -> Quality:
    """Quality of `model` on evenly spaced windows of a text, against `base` when there is one.

    Both name a folder or a hub id; the tokenizer is the model's. Raises InputError and UsageError.
    """
    text = read_text(text_file)
    source = resolve_source(model)
    checkpoint = open_checkpoint(source.folder)
    original = None if base is None else open_checkpoint(resolve_source(base).folder)
    if original is not None and original.spec.vocab_size != checkpoint.spec.vocab_size:
        raise InputError(
            f"base '{base}' has a vocabulary of {original.spec.vocab_size}, "
            f"'{model}' one of {checkpoint.spec.vocab_size}",
            remedy="compare a checkpoint with the float model it was made from",
        )
    tokenizer = load_tokenizer(source.folder)
    first = start_token(tokenizer, checkpoint.spec.config)
    tokens = text_windows(text, tokenizer, first, count=windows, length=length)
    return evaluate(checkpoint, tokens, original, progress=progress)
