"""Where a quantized model drifts from its float model: the residual stream after every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING
from anequant.quantization.linear import relative_error
from anequant.reference.forward import ReferenceModel, Weights


@dataclass(frozen=True)
class LayerError:
    """||h' - h R1|| / ||h|| over all positions, h and h' the residual stream after the layer."""

    layer: int
    relative_error: float


def layer_errors(
    model: Weights, base: Weights, tokens: Tensor, rotate: Callable[[Tensor], Tensor]
) -> tuple[LayerError, ...]:
    """Both models on tokens [n, length]; `rotate` turns the base's hidden states into the model's basis."""
    runner, base_runner = (
        ReferenceModel(base.spec, torch.float32, weights.online) for weights in (model, base)
    )
    ours, theirs = _embedded(model, tokens), _embedded(base, tokens)
    errors = []
    for layer in range(base.spec.num_layers):
        theirs = base_runner.run_layer(layer, base.layer(layer), theirs)
        ours = runner.run_layer(layer, model.layer(layer), ours)
        errors.append(LayerError(layer, relative_error(ours, rotate(theirs))))
    return tuple(errors)


def embedding_error(
    model: Weights, base: Weights, tokens: Tensor, rotate: Callable[[Tensor], Tensor]
) -> float:
    """The same error before the first layer; large when the two streams are in different bases."""
    return relative_error(_embedded(model, tokens), rotate(_embedded(base, tokens)))


def _embedded(model: Weights, tokens: Tensor) -> Tensor:
    return model.read(f"{EMBEDDING}.weight")[tokens].float()
