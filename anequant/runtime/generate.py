"""Text from a model that maps tokens to the next token's logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from anequant.errors import UsageError, is_unicode, quote

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE = re.compile("<0x[0-9A-F]{2}>")
LONGEST_CLEANED = 3
"""Letters of what `clean_up_tokenization` takes a space from (" n't"), without the last one."""

Choice = Callable[[Tensor], int]
"""Picks the next token from logits [vocab]."""


class Decoder(Protocol):
    """Feeds tokens after those before them; holds at most `context` of them, `position` so far.

    `feed` gives logits [vocab] for what follows all of them, `feed_each` [n, vocab] for what follows each.
    """

    @property
    def position(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def tells_all_logits(self) -> bool: ...
    def reset(self) -> None: ...
    def feed(self, tokens: Sequence[int]) -> Tensor: ...
    def feed_each(self, tokens: Sequence[int]) -> Tensor: ...


def check_fits(decoder: Decoder, count: int) -> None:
    """Raise UsageError when `count` more tokens are none, or too many for the context."""
    if count == 0:
        raise UsageError("there is no token to go on from", remedy="write at least a word")
    if not 0 < count <= decoder.context - decoder.position:
        raise UsageError(
            f"{decoder.position + count} tokens, the model holds 1 to {decoder.context}",
            remedy="shorten the prompt; packages can be lowered again with a larger --context",
        )


def generate_tokens(
    decoder: Decoder, prompt: Sequence[int], choose: Choice, *, limit: int, stop: Collection[int]
) -> Iterator[int]:
    """Yield the tokens that go on after `prompt`: up to `limit` of them, a stop token or a full context.

    The prompt goes after what the decoder holds already. The last token is not fed back.
    Raises UsageError when the prompt does not fit.
    """
    check_fits(decoder, len(prompt))
    logits = decoder.feed(prompt)
    for produced in range(1, limit + 1):
        token = choose(logits)
        if token in stop:
            return
        yield token
        if produced == limit or decoder.position == decoder.context:
            return
        logits = decoder.feed([token])


def score(decoder: Decoder, tokens: Sequence[int], first: int) -> Tensor:
    """Return logits [len(tokens) - first, vocab] that predict tokens[first:], each from all before it.

    `first` is at least 1. Starts from an empty context.
    """
    decoder.reset()
    start = decoder.feed(tokens[:first])[None]
    rest = tokens[first:-1]
    return torch.cat([start, decoder.feed_each(rest)]) if rest else start


def encode_text(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Return a text's tokens; `options` go to the tokenizer. Raises UsageError for what is no Unicode."""
    if not is_unicode(text):
        raise UsageError(f"{quote(text)} is not UTF-8", remedy="write it in UTF-8")
    tokens: list[int] = tokenizer(text, **options)["input_ids"]
    return tokens


def decode_pieces(tokenizer: Any, tokens: Iterator[int], before: Sequence[int] = ()) -> Iterator[str]:
    """Yield the text of tokens, piece by piece: what the tokenizer's `decode` of all of them says after the
    text of those `before`, without special tokens.

    A tokenizer may strip the first word's space, merge bytes to characters, and clean up spaces, so each
    piece comes from decoding everything, once nothing that may follow can change it.
    """
    produced = list(before)
    text = start = tokenizer.decode(produced, skip_special_tokens=True)
    told: int | None = None
    for token in tokens:
        produced.append(token)
        last, text = text, tokenizer.decode(produced, skip_special_tokens=True)
        if text != last and _is_settled(tokenizer, produced, text):
            told = _count_shared(start, text) if told is None else told
            yield text[told:]
            told = len(text)
    rest = text[_count_shared(start, text) if told is None else told :]
    if rest:
        yield rest


def _is_settled(tokenizer: Any, tokens: Sequence[int], text: str) -> bool:
    """Tell whether no token after these can change their text.

    A run of byte tokens is one unit, and is all replacement characters when it is not UTF-8.
    """
    if text.endswith(REPLACEMENT) or BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(tokens[-1]))):
        return False
    if not tokenizer.clean_up_tokenization_spaces:
        return True
    plain = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return " " not in plain[-LONGEST_CLEANED:]


def _count_shared(one: str, other: str) -> int:
    """Count the characters that both begin with."""
    apart = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(apart, min(len(one), len(other)))
