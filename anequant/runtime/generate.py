"""Text from a model that maps tokens to the next token's logits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from torch import Tensor


class Decoder(Protocol):
    """Feeds tokens after those before them and returns logits [vocab] for what follows."""

    def feed(self, tokens: Sequence[int]) -> Tensor: ...


def greedy_tokens(
    decoder: Decoder, prompt: Sequence[int], *, limit: int, stop: Collection[int]
) -> Iterator[int]:
    """The arg-max continuation of `prompt`, token by token, up to `limit` tokens or a stop token."""
    logits = decoder.feed(prompt)
    for produced in range(1, limit + 1):
        token = int(logits.argmax())
        if token in stop:
            return
        yield token
        if produced < limit:
            logits = decoder.feed([token])
