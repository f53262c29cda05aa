"""What calibration knows of one linear's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_FLOOR = 1e-30


@dataclass(frozen=True)
class Moments:
    """Second moments over some tokens, float32.

    hessian  [in, in]  E[x x^T] of the input x in the model quantized so far
    cross    [in, in]  E[x_float x^T], with x_float the same input in the float model
    tokens             how many were seen
    """

    hessian: Tensor
    cross: Tensor
    tokens: int


@dataclass(frozen=True)
class InputStatistics:
    """`fit` rounds; `held_out`, from other windows, chooses how. `everything` is both together."""

    fit: Moments
    held_out: Moments

    @property
    def everything(self) -> Moments:
        total = self.fit.tokens + self.held_out.tokens
        share = self.fit.tokens / total
        return Moments(
            torch.lerp(self.held_out.hessian, self.fit.hessian, share),
            torch.lerp(self.held_out.cross, self.fit.cross, share),
            total,
        )

    @property
    def dead_inputs(self) -> int:
        """Inputs that were zero at every token, in the float model or the quantized one."""
        seen = self.everything
        energy = torch.minimum(seen.hessian.diagonal(), seen.cross.diagonal().abs())
        return int((energy <= UNIT_FLOOR).sum())


def output_loss(weight: Tensor, rounded: Tensor, moments: Moments) -> float:
    """E||W x_float - Q x||^2 up to a constant that does not depend on Q: tr(Q H Q^T) - 2 tr(W C Q^T).

    weight and rounded are [out, in].
    """
    pull = rounded @ moments.hessian - 2 * (weight @ moments.cross)
    return float((rounded * pull).sum(dtype=torch.float64))
