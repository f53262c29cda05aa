"""Token windows from text, each starting as the model's training windows did; and what a check runs on when
nobody names a text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT, TOKENIZER_FILES, has_tokenizer
from anequant.errors import InputError, UsageError, first_line
from anequant.reference.sources import read_source_text, read_text

PROBE_SEED = 7
RANGE_TOKENS = 128
"""The tokens on which magnitudes are looked at, for what packages have to hold."""

PREFILL_TOKENS, DECODE_TOKENS = 64, 64
"""The most tokens that packages are compared on, at once and one by one, as batch and context allow."""


def load_tokenizer(folder: Path) -> Any:
    """Return the checkpoint's own tokenizer, without remote code. Raises InputError naming the folder."""
    from transformers import AutoTokenizer

    for name in TOKENIZER_FILES:
        if (folder / name).exists() and not (folder / name).is_file():
            raise InputError(f"'{name}' is not a regular file", where=str(folder))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = first_line(error)
        raise InputError(f"the tokenizer of '{folder}' cannot be read: {reason}") from error


def find_start_token(tokenizer: Any, config: Mapping[str, Any]) -> int:
    """Return the token a window starts with: the tokenizer's BOS, else the config's, else EOS.

    Models without a BOS (Qwen) put their massive activation on whatever comes first; starting every
    window with the document separator keeps that where training had it.
    Raises InputError for a model without any, and for one that its vocabulary does not hold.
    """
    for token in (tokenizer.bos_token_id, config.get("bos_token_id"), tokenizer.eos_token_id):
        if isinstance(token, int):
            require_known([token], config.get("vocab_size"))
            return token
    raise InputError("neither the tokenizer nor config.json names a token that starts a text")


def require_known(tokens: Sequence[int], vocab_size: int | None) -> None:
    """Raises InputError for tokens that the embedding has no row for; None: it is not known how many."""
    unknown = [] if vocab_size is None else [token for token in tokens if not 0 <= token < vocab_size]
    if unknown:
        raise InputError(
            f"the tokenizer gives token {max(unknown)}, the model knows {vocab_size}",
            remedy="check that tokenizer and model belong together",
        )


def read_text_windows(
    folder: Path, config: Mapping[str, Any], text: Path | str = SAMPLE_TEXT, *, count: int, length: int
) -> Tensor:
    """Cut windows from a text by the tokenizer in a model's folder: int64 [at most count, length].

    `config` is the model's config.json; `text` is a file of prose, texts or conversations, or the text
    itself. Raises what `load_tokenizer`, `read_source_text` and `cut_model_windows` raise.
    """
    tokenizer = load_tokenizer(folder)
    content = text if isinstance(text, str) else read_source_text(text, tokenizer)
    return cut_model_windows(tokenizer, config, content, count=count, length=length)


def cut_model_windows(
    tokenizer: Any, config: Mapping[str, Any], text: str, *, count: int, length: int
) -> Tensor:
    """Cut windows as `cut_windows` does, after the start token of a tokenizer and its model's config.json.

    Raises as `find_start_token`, `require_known` and `cut_windows` do.
    """
    windows = cut_windows(text, tokenizer, find_start_token(tokenizer, config), count=count, length=length)
    require_known(windows.flatten().tolist(), config.get("vocab_size"))
    return windows


def cut_windows(text: str, tokenizer: Any, first: int, *, count: int, length: int, seed: int = 0) -> Tensor:
    """Return evenly spaced windows of a text: int64 [count, length], each starting with token `first`.

    Every seed but 0 moves all windows by another share of their spacing, and a window that would start with
    `first` twice starts before it. Fewer than `count` rows when the text holds fewer whole windows; raises
    UsageError when it holds none.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begun = next((place for place, token in enumerate(ids) if token != first), len(ids))
    tokens = torch.tensor(ids[begun:], dtype=torch.int64)
    count = min(count, tokens.numel() // (length - 1))
    if count == 0:
        raise UsageError(f"the text has {tokens.numel()} tokens, one window needs {length - 1}")
    step = min(tokens.numel() // (count + 1), tokens.numel() - (length - 1))
    room = min(step, tokens.numel() - (length - 1) - (count - 1) * step)
    share = float(torch.rand((), generator=torch.Generator().manual_seed(seed))) if seed else 0.0
    offset = int(share * room)
    start = torch.tensor([first])
    starts = [_before(tokens, first, offset + i * step) for i in range(count)]
    return torch.stack([torch.cat([start, tokens[begin : begin + length - 1]]) for begin in starts])


def pack_windows(
    texts: Sequence[str], tokenizer: Any, first: int, *, count: int, length: int, seed: int = 0
) -> Tensor:
    """Return windows that begin where one of the texts does: int64 [count, length], each starting with token
    `first` once, whether its text has it or not.

    Where a text ends before the window does, those that follow fill it; the last is cut off, and the next
    window begins with the text after it. Where there are more windows than wanted they are evenly spaced,
    and every seed but 0 moves them by another share of their spacing. Fewer than `count` rows when the texts
    fill fewer; raises UsageError when they fill none.
    """
    windows: list[list[int]] = []
    window: list[int] = []
    held = 0
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        begun = next((place for place, token in enumerate(ids) if token != first), len(ids))
        window += [first] if begun or not window else []
        window += ids[begun:]
        held += len(ids)
        if len(window) >= length:
            windows.append(window[:length])
            window = []
    if not windows:
        raise UsageError(f"the conversations have {held} tokens, one window needs {length}")
    step = max(1.0, len(windows) / count)
    share = float(torch.rand((), generator=torch.Generator().manual_seed(seed))) if seed else 0.0
    chosen = [int((place + share) * step) for place in range(min(count, len(windows)))]
    return torch.tensor([windows[place] for place in chosen])


def _before(tokens: Tensor, first: int, place: int) -> int:
    """`place`, or where the run of `first` that it lies in begins, less one; tokens[0] is none."""
    while tokens[place] == first:
        place -= 1
    return place


def choose_probe_tokens(checkpoint: Checkpoint, length: int) -> Tensor:
    """Return the start of the bundled text, or random tokens for a checkpoint without a tokenizer:
    [length]."""
    if has_tokenizer(checkpoint.folder):
        text = read_text(SAMPLE_TEXT)
        text *= length // len(text.split()) + 1
        tokenizer = load_tokenizer(checkpoint.folder)
        return cut_model_windows(tokenizer, checkpoint.spec.config, text, count=1, length=length)[0]
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randint(checkpoint.spec.vocab_size, (length,), generator=generator)
