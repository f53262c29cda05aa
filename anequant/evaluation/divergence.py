"""How far a model is from another on the same tokens: in its predictions, and after every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING
from anequant.jobs.control import Progress, silent
from anequant.reference.forward import ReferenceModel, Weights, compute_logits, logits, run_to_final_states


@dataclass(frozen=True)
class Quality:
    """Means over `tokens` predictions; NLL and KL in nats.

    `nll_error` is the standard error of `nll` over windows, None for a single one. The last four compare
    with the base model and are None without one: extra NLL, KL(base || model), and the share of equal
    arg-max tokens.
    """

    tokens: int
    windows: int
    nll: float
    nll_error: float | None
    base_nll: float | None = None
    extra_nll: float | None = None
    kl: float | None = None
    top1: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 100.0))

    def to_dict(self) -> dict[str, float | int | None]:
        return {
            "windows": self.windows,
            "tokens": self.tokens,
            "perplexity": self.perplexity,
            "nll": self.nll,
            "nll_error": self.nll_error,
            "base_perplexity": None if self.base_nll is None else math.exp(min(self.base_nll, 100.0)),
            "extra_nll": self.extra_nll,
            "kl": self.kl,
            "top1": self.top1,
        }


def measure_quality(
    model: Weights, tokens: Tensor, base: Weights | None = None, *, progress: Progress = silent
) -> Quality:
    """Measure quality on token windows [n, length]; every window's first token is given, the rest are
    predicted."""
    if base is None:
        return summarise(tokens, logits(model, tokens, progress=progress), None)

    halves = progress.part("model", 0.0, 0.5), progress.part("base", 0.5, 1.0)
    ours, theirs = (
        logits(each, tokens, progress=half) for each, half in zip((model, base), halves, strict=True)
    )
    return summarise(tokens, ours, theirs)


@dataclass(frozen=True)
class Reference:
    """What a base model says of token windows [n, length], to compare several models with: its normalised
    hidden states [n, length, hidden_size] in float32 and its head [vocab, hidden_size]. Logits are wider by
    far, and made again each time."""

    hidden: Tensor
    head: Tensor

    def logits(self) -> Iterator[Tensor]:
        """Return logits [length, vocab] of one window after the other, as `logits` of the base gives them."""
        return (compute_logits(self.head, window) for window in self.hidden)


def record_reference(base: Weights, tokens: Tensor, *, progress: Progress = silent) -> Reference:
    return Reference(run_to_final_states(base, tokens, progress=progress), base.read(base.head_name))


def measure_quality_against(
    model: Weights, tokens: Tensor, base: Reference, *, progress: Progress = silent
) -> Quality:
    """Measure quality against a base that was run on the same `tokens` [n, length] before."""
    return summarise(tokens, logits(model, tokens, progress=progress), base.logits())


def token_nll(log_probabilities: Tensor, window: Tensor) -> Tensor:
    """Return -log p of each next token, [length - 1], from log probabilities [length, vocab]."""
    return -log_probabilities[:-1].gather(-1, window[1:, None]).squeeze(-1)


def summarise(tokens: Tensor, ours: Iterable[Tensor], base: Iterable[Tensor] | None) -> Quality:
    """Return quality from logits [length, vocab], a window after the other; a base's come right after
    ours."""
    window_nll: list[float] = []
    base_nll = divergence = agreement = 0.0
    base_windows = iter(base) if base is not None else None
    for window, values in zip(tokens, ours, strict=True):
        log_q = values.log_softmax(-1)
        window_nll.append(float(token_nll(log_q, window).double().mean()))
        if base_windows is None:
            continue
        log_p = next(base_windows).log_softmax(-1)
        base_nll += float(token_nll(log_p, window).double().mean())
        log_p, log_q = log_p[:-1], log_q[:-1]
        agreement += float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
        divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean())
    count = len(window_nll)
    nll = torch.tensor(window_nll, dtype=torch.float64)
    error = float(nll.std() / math.sqrt(count)) if count > 1 else None
    result = Quality(count * (tokens.shape[1] - 1), count, float(nll.mean()), error)
    if base_windows is None:
        return result
    return Quality(
        result.tokens,
        count,
        result.nll,
        error,
        base_nll=base_nll / count,
        extra_nll=result.nll - base_nll / count,
        kl=divergence / count,
        top1=agreement / count,
    )


@dataclass(frozen=True)
class LayerError:
    """||h' - h R1|| / ||h|| over all positions; h and h' are the residual streams after the layer."""

    layer: int
    relative_error: float


def measure_layer_errors(
    model: Weights, base: Weights, tokens: Tensor, rotate: Callable[[Tensor], Tensor]
) -> tuple[LayerError, ...]:
    """Run both models on tokens [n, length]; `rotate` brings the base's hidden states into the model's
    basis."""
    runner, base_runner = (
        ReferenceModel(base.spec, torch.float32, weights.online) for weights in (model, base)
    )
    ours, theirs = _embedded(model, tokens), _embedded(base, tokens)
    errors = []
    for layer in range(base.spec.num_layers):
        theirs = base_runner.run_layer(layer, base.layer(layer), theirs)
        ours = runner.run_layer(layer, model.layer(layer), ours)
        errors.append(LayerError(layer, _relative_error(ours, theirs, rotate)))
    return tuple(errors)


def measure_embedding_error(
    model: Weights, base: Weights, tokens: Tensor, rotate: Callable[[Tensor], Tensor]
) -> float:
    """Measure the same error before the first layer; it is large when the streams are in different bases."""
    return _relative_error(_embedded(model, tokens), _embedded(base, tokens), rotate)


def _embedded(model: Weights, tokens: Tensor) -> Tensor:
    return model.read(f"{EMBEDDING}.weight")[tokens].float()


def _relative_error(ours: Tensor, theirs: Tensor, rotate: Callable[[Tensor], Tensor]) -> float:
    return float((ours - rotate(theirs)).norm() / theirs.norm())
