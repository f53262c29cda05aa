"""Text from a model that maps tokens to the next token's logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from anequant.errors import UsageError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Choice = Callable[[Tensor], int]
"""Picks the next token from logits [vocab]."""


class Decoder(Protocol):
    """Feeds tokens after those before them; holds at most `context` of them, `position` so far.

    `feed` gives logits [vocab] for what follows all of them, `feed_each` [n, vocab] for what follows each.
    """

    position: int

    @property
    def context(self) -> int: ...
    @property
    def tells_all_logits(self) -> bool: ...
    def reset(self) -> None: ...
    def feed(self, tokens: Sequence[int]) -> Tensor: ...
    def feed_each(self, tokens: Sequence[int]) -> Tensor: ...


def check_fits(decoder: Decoder, count: int) -> None:
    """Raises UsageError when `count` more tokens are none, or too many for the context."""
    if not 0 < count <= decoder.context - decoder.position:
        raise UsageError(
            f"{decoder.position + count} tokens, the model holds 1 to {decoder.context}",
            remedy="shorten the prompt; packages can be lowered again with a larger --context",
        )


def new_tokens(
    decoder: Decoder, prompt: Sequence[int], choose: Choice, *, limit: int, stop: Collection[int]
) -> Iterator[int]:
    """The continuation of `prompt`, token by token: up to `limit` tokens, a stop token or a full context.

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
    """Logits [len(tokens) - first, vocab] that predict tokens[first:], each from all tokens before it.

    `first` is at least 1. Starts from an empty context.
    """
    decoder.reset()
    start = decoder.feed(tokens[:first])[None]
    rest = tokens[first:-1]
    return torch.cat([start, decoder.feed_each(rest)]) if rest else start


def decoded(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens, piece by piece: what a token adds once its characters are complete."""
    produced: list[int] = []
    shown = ""
    for token in tokens:
        produced.append(token)
        text = tokenizer.decode(produced, skip_special_tokens=True)
        if not text.endswith(REPLACEMENT):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(produced, skip_special_tokens=True)[len(shown) :] if produced else ""
    if rest:
        yield rest
