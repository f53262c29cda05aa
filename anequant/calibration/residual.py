"""The second moment of the residual stream, which the PCA rotation is made from."""

from __future__ import annotations

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING
from anequant.jobs.control import Progress, silent
from anequant.reference.forward import ReferenceModel, Weights


def residual_moment(weights: Weights, tokens: Tensor, progress: Progress = silent) -> Tensor:
    """Mean of x x^T over the tokens [n, length] and over where layers and head read the stream: float64
    [hidden_size, hidden_size].

    x is the stream as it enters each layer and leaves the last one, over its root mean square, as the
    linears see it once the norms' gains are folded: layers weigh alike, though the stream grows.
    """
    spec = weights.spec
    model = ReferenceModel(spec, torch.float32, weights.online)
    ones = torch.ones(spec.hidden_size)
    hidden = weights.read(f"{EMBEDDING}.weight")[tokens].float()
    moment = torch.zeros(spec.hidden_size, spec.hidden_size, dtype=torch.float64)
    for layer in range(spec.num_layers + 1):
        with torch.no_grad():
            rows = model.final_norm(hidden, ones).flatten(0, 1)
        moment += rows.T @ rows
        if layer < spec.num_layers:
            progress(f"layer {layer + 1}", layer / spec.num_layers)
            hidden = model.run_layer(layer, weights.layer(layer), hidden)
    return moment / (tokens.numel() * (spec.num_layers + 1))
