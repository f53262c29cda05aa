"""Tokens that a model draws from its own predictions, and how much these surprise it.

The surprise -log p(y) of y drawn from p has a gradient of mean zero, and the mean of its outer product is the
Fisher information: what a change of the model does to its predictions, to second order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from anequant.errors import InputError
from anequant.reference.forward import ReferenceModel
from anequant.reference.head_loss import PIECE

BLOCK = 256
"""Tokens whose chances are added up before one of them is looked for."""

ALMOST = 1 - 2.0**-40
"""Of a block's sum, what is passed within it however that sum was rounded."""


def draw_tokens(logits: Tensor, generator: torch.Generator) -> Tensor | None:
    """Return a token of the distribution of each row of logits [n, vocab]: int64 [n]; None where they are not
    finite.

    A token is where the sum of chances passes a random share of all. They are added up by blocks, so that
    this sum is looked for among few numbers.
    """
    count, vocab = logits.shape
    chances = pad(logits.float(), (0, -vocab % BLOCK), value=-math.inf)
    chances = chances.sub_(chances.amax(-1, keepdim=True)).exp_().view(count, -1, BLOCK)
    sums = chances.sum(-1).double().cumsum_(-1)
    if not bool(sums[:, -1].isfinite().all()):
        return None
    wanted = torch.rand(count, 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
    block = torch.searchsorted(sums, wanted, right=True)
    left = wanted - pad(sums, (1, 0)).gather(1, block)
    within = chances[torch.arange(count), block.squeeze(1)].double().cumsum_(-1)
    place = torch.searchsorted(within, torch.minimum(left, within[:, -1:] * ALMOST), right=True)
    return (block * BLOCK + place).squeeze(1)


def differentiate_surprise(
    model: ReferenceModel, hidden: Tensor, head: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the gradient of -log p(y) for final states hidden [n, length, hidden_size], y drawn from p at
    every position; head [vocab, hidden_size] has the final norm's gain folded in.

    With h the normalised states it is (p - 1_y) head for h, from where autograd goes on. Raises InputError
    for logits that are not finite.
    """
    parts, ones = [], torch.ones(hidden.shape[-1])
    for states in hidden.flatten(0, 1).split(PIECE):
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            normed = model.final_norm(leaf, ones)
        logits = normed.detach() @ head.T
        drawn = draw_tokens(logits, generator)
        if drawn is None:
            raise InputError(
                "the model's own logits are not finite on the calibration tokens",
                remedy="check the checkpoint for a damaged tensor",
            )
        outputs = logits.float().softmax(-1).to(head.dtype) @ head - head[drawn]
        parts.append(torch.autograd.grad(normed, leaf, outputs)[0])
    return torch.cat(parts).view_as(hidden)
