"""How far a model is from another on the same tokens: in its predictions, and after every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING
from anequant.evaluation.quality import Quality, summarise
from anequant.jobs.control import Progress, silent
from anequant.reference.forward import ReferenceModel, Weights, compute_logits, logits, run_to_final_states

NOISE_WINDOWS = 8
"""The most windows that the noise floor is measured on, which takes a run more and varies little."""


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


@dataclass(frozen=True)
class NoiseFloor:
    """How far float16 alone moves a float model from itself in float32: no smaller KL tells of quantization.

    KL in nats and the share of equal arg-max tokens over `windows`; both None for the reason in `missing`.
    """

    windows: int
    kl: float | None
    top1: float | None
    missing: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_noise_floor(
    base: Weights, tokens: Tensor, recorded: Reference, *, progress: Progress = silent
) -> NoiseFloor:
    """Run a base in float16, weights and hidden states, on the first NOISE_WINDOWS of the tokens [n, length]
    that it was `recorded` on in float32."""
    first = tokens[:NOISE_WINDOWS]
    if base.online != base.online.rotations:
        return NoiseFloor(len(first), None, None, "the base rounds while it runs, so it is no float model")
    rounded = (window.float() for window in logits(base, first, torch.float16, progress))
    quality = summarise(first, rounded, recorded.logits())
    assert quality.kl is not None
    if not math.isfinite(quality.kl):
        return NoiseFloor(len(first), None, None, "the model overflows in float16")
    return NoiseFloor(len(first), quality.kl, quality.top1, None)


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
