"""Calibration windows as a JSON file, a list of {"input_ids": [...], "text": "..."} as ANEMLL's scripts have
it."""

from __future__ import annotations

import json
from pathlib import Path

from anequant.calibration.tokens import WIKITEXT2, wikitext2
from anequant.checkpoints.reader import read_config
from anequant.errors import ResourceError, UsageError
from anequant.recipe import Calibration
from anequant.reference.sources import has_rows, read_source, source_text
from anequant.reference.windows import load_tokenizer, model_windows

PREVIEW = 500


def save_calibration(output: Path, model: Path, source: str, *, count: int, length: int) -> int:
    """Write `count` windows of `source`, a text file or wikitext2, by the tokenizer in the folder `model`.

    Each comes with the beginning of its text. Returns the number of windows, less than `count` when the
    text holds less. Raises UsageError for a text that cannot be read or holds no window, InputError
    without a tokenizer, ResourceError when WikiText-2 cannot be had or the file not be written.
    """
    tokenizer = load_tokenizer(model)
    text = wikitext2("train") if source == WIKITEXT2 else source_text(Path(source), tokenizer)
    windows = model_windows(tokenizer, read_config(model), text, count=count, length=length)
    rows = [
        {"input_ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)[:PREVIEW]}
        for ids in windows.tolist()
    ]
    try:
        output.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"'{output}' cannot be written: {error.strerror}") from error
    return len(rows)


def whole_calibration(source: str) -> Calibration:
    """The Calibration that sees all rows of a file of token ids, cut to the shortest; the default sizes for
    any other source.

    Raises UsageError for a JSON file that is not understood or holds no windows.
    """
    rows = read_source(Path(source)) if has_rows(Path(source)) else None
    if not isinstance(rows, list):
        return Calibration(source)
    lengths = [len(row) for row in rows]
    if min(lengths, default=0) < 2:
        raise UsageError(f"calibration file '{source}' holds no windows of two tokens or more")
    return Calibration(source, samples=len(lengths), length=min(lengths))
