"""A descent step that stays on the orthogonal matrices.

At an orthogonal X [n, n], the directions along which X stays orthogonal are W X with W skew, W^T = -W. The
part of a direction M in that space is W X with W = A - A^T, A = 1/2 M X^T. The Cayley transform follows W X
along a curve that never leaves the orthogonal matrices, since (I - V)^-1 (I + V) is orthogonal for skew V:

    X(a) = (I - a/2 W)^-1 (I + a/2 W) X.

Li, Fuxin, Todorovic, "Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform",
2020, algorithm 1 (Cayley SGD with momentum), as SpinQuant uses it (Liu et al. 2024, section 3.2). There the
inverse is approached by a few fixed-point iterations, after which X has to be made orthogonal again; here the
linear system is solved, in float64, so that X is orthogonal to rounding after every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_STEP = 8.0
"""Bound on a * ||W||_1, so that no gradient moves the matrix at random."""


def cayley_step(
    x: Tensor, gradient: Tensor, momentum: Tensor, rate: float, decay: float
) -> tuple[Tensor, Tensor]:
    """Return the X and the momentum that follow an orthogonal x, all float64 [n, n].

    `momentum` starts at zero and fades by `decay` a step; `rate` bounds the step's length.
    """
    direction = momentum * decay - gradient
    half = 0.5 * direction @ x.T
    skew = half - half.T
    momentum = skew @ x
    size = min(rate, LARGEST_STEP / (float(torch.linalg.matrix_norm(skew, 1)) + 1e-8))
    identity = torch.eye(len(x), dtype=x.dtype)
    moved: Tensor = torch.linalg.solve(identity - 0.5 * size * skew, momentum * (0.5 * size) + x)
    return moved, momentum
