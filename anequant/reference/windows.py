"""Token windows from text, each starting as the model's training windows did."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.checkpoints.source import TOKENIZER_FILES
from anequant.errors import InputError, UsageError, first_line
from anequant.strict import read_plain


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's own tokenizer, without remote code. Raises InputError naming the folder."""
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


def start_token(tokenizer: Any, config: Mapping[str, Any]) -> int:
    """The token a window starts with: the tokenizer's BOS, else the config's, else EOS.

    Models without a BOS (Qwen) put their massive activation on whatever comes first; starting every
    window with the document separator keeps that where training had it.
    Raises InputError for a model without any, and for one that its vocabulary does not hold.
    """
    for token in (tokenizer.bos_token_id, config.get("bos_token_id"), tokenizer.eos_token_id):
        if isinstance(token, int):
            require_known([token], config.get("vocab_size"))
            return token
    raise InputError("neither the tokenizer nor config.json names a token that starts a text")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; raises UsageError for anything else."""
    try:
        text = read_plain(path)
        if "\0" in text:
            raise ValueError("it holds NUL, as binary files do")
    except UnicodeDecodeError as error:
        reason = f"byte {error.object[error.start]:#04x} at {error.start} is no UTF-8"
        raise UsageError(f"text file '{path}' cannot be read: {reason}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"text file '{path}' cannot be read: {error}") from error
    return text


def require_known(tokens: Sequence[int], vocab_size: int | None) -> None:
    """Raises InputError for tokens that the embedding has no row for; None: it is not known how many."""
    unknown = [] if vocab_size is None else [token for token in tokens if not 0 <= token < vocab_size]
    if unknown:
        raise InputError(
            f"the tokenizer gives token {max(unknown)}, the model knows {vocab_size}",
            remedy="check that tokenizer and model belong together",
        )


def model_windows(tokenizer: Any, config: Mapping[str, Any], text: str, *, count: int, length: int) -> Tensor:
    """As `text_windows`, after the start token of a tokenizer and its model's config.json.

    Raises as `start_token`, `require_known` and `text_windows` do.
    """
    windows = text_windows(text, tokenizer, start_token(tokenizer, config), count=count, length=length)
    require_known(windows.flatten().tolist(), config.get("vocab_size"))
    return windows


def text_windows(text: str, tokenizer: Any, first: int, *, count: int, length: int, seed: int = 0) -> Tensor:
    """Evenly spaced windows of a text: int64 [count, length], each starting with token `first`.

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


def _before(tokens: Tensor, first: int, place: int) -> int:
    """`place`, or where the run of `first` that it lies in begins, less one; tokens[0] is none."""
    while tokens[place] == first:
        place -= 1
    return place
