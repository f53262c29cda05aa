"""Losses of what the head makes of final states, and their gradients, some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from anequant.reference.forward import ReferenceModel

PIECE = 256
"""Tokens whose logits, which are wide, are in memory at once while a loss is computed."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Summed loss of normalised states [tokens, hidden_size] and whatever belongs to these tokens."""


def sum_head_loss(model: ReferenceModel, hidden: Tensor, gain: Tensor, targets: Tensor, loss: Loss) -> float:
    """Return the sum over hidden [n, length, hidden_size] and targets [n, length, ...]."""
    with torch.no_grad():
        return sum(float(loss(model.final_norm(states, gain), t)) for states, t in _pieces(hidden, targets))


def differentiate_head(
    model: ReferenceModel, hidden: Tensor, gain: Tensor, targets: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """Return gradients of `sum_head_loss` for hidden and for the final norm's gain [hidden_size]."""
    parts, total = [], torch.zeros_like(gain)
    weight = gain.detach().requires_grad_()
    for states, part_targets in _pieces(hidden, targets):
        leaf = states.detach().requires_grad_()
        value = loss(model.final_norm(leaf, weight), part_targets)
        part, gain_part = torch.autograd.grad(value, (leaf, weight))
        parts.append(part)
        total += gain_part
    return torch.cat(parts).view_as(hidden), total


def _pieces(hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    pairs = (torch.split(values.flatten(0, 1), PIECE) for values in (hidden, targets))
    yield from zip(*pairs, strict=True)
