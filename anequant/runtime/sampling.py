"""How the next token is drawn from logits: temperature, then top-k, then top-p, as transformers does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.errors import UsageError
from anequant.runtime.generate import Choice


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the best token; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        finite = 0 <= self.temperature < math.inf
        if not finite or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"temperature {self.temperature}, top-k {self.top_k}, top-p {self.top_p}",
                remedy="use a finite temperature and a top-k of at least 0, and a top-p above 0 and up to 1",
            )


def make_chooser(sampling: Sampling) -> Choice:
    """Return a function that draws one token after the other; equal seeds draw equal tokens."""
    if sampling.temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator().manual_seed(sampling.seed)

    def draw(logits: Tensor) -> int:
        return int(torch.multinomial(compute_chances(logits, sampling), 1, generator=generator))

    return draw


def compute_chances(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities [vocab] of logits [vocab] at a temperature above 0.

    top_k keeps the k best tokens (and ties with the last of them); top_p the fewest best whose
    probabilities reach p (Holtzman et al. 2020, section 3.1). However small the temperature, none is NaN.
    """
    values = logits.float()
    values = (values - values.max()) / max(sampling.temperature, torch.finfo(values.dtype).tiny)
    if 0 < sampling.top_k < len(values):
        values = values.masked_fill(values < values.topk(sampling.top_k).values[-1], float("-inf"))
    probabilities = values.softmax(0)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities = probabilities.index_fill(0, order[before >= sampling.top_p], 0.0)
    return probabilities / probabilities.sum()
