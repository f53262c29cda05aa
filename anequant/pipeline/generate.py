"""Text from a folder of packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from anequant.calibration.text import load_tokenizer
from anequant.pipeline.convert import packages_folder
from anequant.runtime.coreml_backend import PackageModel
from anequant.runtime.generate import greedy_tokens


def continue_text(folder: Path, prompt: str, limit: int) -> Iterator[str]:
    """`prompt`, then its greedy continuation piece by piece; `folder` is an output of convert or lower.

    Stops at the end token, after `limit` tokens, or when the packages' context is full.
    Raises InputError for a damaged folder, UsageError for a prompt that does not fit.
    """
    packages = packages_folder(folder)
    tokenizer = load_tokenizer(packages)
    tokens = tokenizer(prompt)["input_ids"]
    model = PackageModel(packages)
    model.check_fits(len(tokens))
    limit = min(limit, model.packages.context - len(tokens))
    stop = {tokenizer.eos_token_id} - {None}
    yield prompt
    produced: list[int] = []
    shown = ""
    for token in greedy_tokens(model, tokens, limit=limit, stop=stop):
        produced.append(token)
        text = tokenizer.decode(produced)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
