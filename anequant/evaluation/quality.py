"""How good the predictions of a model are on windows of a text, and how far from those of another."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anequant.evaluation.intervals import Mean, average
from anequant.jobs.typed import to_plain


@dataclass(frozen=True)
class WindowMeans:
    """Means over the predictions of each window, in the order of the windows: NLL; and without a base None,
    its NLL, KL(base || model) and the share of equal arg-max tokens. In nats."""

    nll: tuple[float, ...]
    base_nll: tuple[float, ...] | None = None
    kl: tuple[float, ...] | None = None
    top1: tuple[float, ...] | None = None

    @property
    def extra_nll(self) -> tuple[float, ...] | None:
        """The NLL less the base's, which is the logarithm of the ratio of the two perplexities."""
        if self.base_nll is None:
            return None
        return tuple(own - other for own, other in zip(self.nll, self.base_nll, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {name: to_plain(getattr(self, name)) for name in ("nll", "extra_nll", "kl", "top1")}


@dataclass(frozen=True)
class Percentiles:
    """KL of single predictions: the value that half, 90%, 99%, 99.9% and all of them do not exceed, linear
    between two of them."""

    median: float
    p90: float
    p99: float
    p99_9: float
    maximum: float


PERCENTS = (50.0, 90.0, 99.0, 99.9, 100.0)
"""In the order of the fields of Percentiles."""


@dataclass(frozen=True)
class Quality:
    """Quality over `tokens` predictions of some windows; what compares with a base model is None without one,
    and so are the percentiles of KL over single predictions."""

    tokens: int
    by_window: WindowMeans
    kl_percentiles: Percentiles | None = None

    @property
    def windows(self) -> int:
        return len(self.by_window.nll)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 100.0))

    @property
    def nll(self) -> float:
        return self.nll_mean.value

    @property
    def nll_error(self) -> float | None:
        """The standard error of the NLL over windows, None for a single one."""
        return self.nll_mean.error

    @property
    def base_nll(self) -> float | None:
        return _value(_average(self.by_window.base_nll))

    @property
    def extra_nll(self) -> float | None:
        return _value(self.extra_nll_mean)

    @property
    def kl(self) -> float | None:
        return _value(self.kl_mean)

    @property
    def top1(self) -> float | None:
        return _value(self.top1_mean)

    @property
    def nll_mean(self) -> Mean:
        """The NLL with its standard error."""
        return average(self.by_window.nll)

    @property
    def extra_nll_mean(self) -> Mean | None:
        """The extra NLL with its standard error: of the differences of the two models, window by window."""
        return _average(self.by_window.extra_nll)

    @property
    def kl_mean(self) -> Mean | None:
        """The KL with its standard error."""
        return _average(self.by_window.kl)

    @property
    def top1_mean(self) -> Mean | None:
        """The share of equal arg-max tokens with its standard error."""
        return _average(self.by_window.top1)

    def to_dict(self) -> dict[str, Any]:
        base = None if self.base_nll is None else math.exp(min(self.base_nll, 100.0))
        return {
            "windows": self.windows,
            "tokens": self.tokens,
            "perplexity": self.perplexity,
            "base_perplexity": base,
            **_state("nll", self.nll_mean),
            **_state("extra_nll", self.extra_nll_mean),
            **_state("kl", self.kl_mean),
            "kl_percentiles": None if self.kl_percentiles is None else asdict(self.kl_percentiles),
            **_state("top1", self.top1_mean),
            "by_window": self.by_window.to_dict(),
        }


def summarise(tokens: Tensor, ours: Iterable[Tensor], base: Iterable[Tensor] | None) -> Quality:
    """Return quality from logits [length, vocab], a window after the other; a base's come right after
    ours."""
    nll: list[float] = []
    base_nll: list[float] = []
    kl: list[float] = []
    top1: list[float] = []
    token_kl: list[Tensor] = []
    base_windows = iter(base) if base is not None else None
    for window, values in zip(tokens, ours, strict=True):
        log_q = values.log_softmax(-1)
        nll.append(float(token_nll(log_q, window).double().mean()))
        if base_windows is None:
            continue
        log_p = next(base_windows).log_softmax(-1)
        base_nll.append(float(token_nll(log_p, window).double().mean()))
        log_p, log_q = log_p[:-1], log_q[:-1]
        top1.append(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
        token_kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        kl.append(float(token_kl[-1].double().mean()))
    predictions = len(nll) * (tokens.shape[1] - 1)
    if base_windows is None:
        return Quality(predictions, WindowMeans(tuple(nll)))
    means = WindowMeans(tuple(nll), tuple(base_nll), tuple(kl), tuple(top1))
    return Quality(predictions, means, find_percentiles(torch.cat(token_kl)))


def token_nll(log_probabilities: Tensor, window: Tensor) -> Tensor:
    """Return -log p of each next token, [length - 1], from log probabilities [length, vocab]."""
    return -log_probabilities[:-1].gather(-1, window[1:, None]).squeeze(-1)


def find_percentiles(values: Tensor) -> Percentiles:
    """Return the percentiles of values [n], exact and linear between two of them."""
    found = np.percentile(values.double().numpy(), PERCENTS)
    return Percentiles(*map(float, found))


def _average(values: tuple[float, ...] | None) -> Mean | None:
    return None if values is None else average(values)


def _value(mean: Mean | None) -> float | None:
    return None if mean is None else mean.value


def _state(name: str, mean: Mean | None) -> dict[str, Any]:
    """Return a figure by its name, and beside it its standard error and interval."""
    value, error, interval = (None,) * 3 if mean is None else (mean.value, mean.error, mean.interval)
    return {name: value, f"{name}_error": error, f"{name}_interval": to_plain(interval)}
