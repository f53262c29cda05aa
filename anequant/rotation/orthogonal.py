"""Orthogonal matrices in the form that is cheapest to apply.

A rotation belongs to one space of the model and maps every activation row x of it to x @ R. A linear that
reads the space keeps its output with the weight W @ R; one that writes to it follows with R.T @ W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.errors import UsageError
from anequant.rotation.hadamard import apply_hadamard_, factor_order, power_of_two_divisors


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix R [size, size], held either as `order` (and `signs`) or as `matrix`.

    Structured: R = diag(signs) @ kron(I, H) / sqrt(order), H the Hadamard matrix of that order and no signs
    meaning all +1; signs are float64 [size], +1 or -1. Dense: `matrix`, float64 [size, size].

    Weights: W @ R is apply(W), and R.T @ W is apply(W.T).T.
    """

    size: int
    signs: Tensor | None = None
    order: int | None = None
    matrix: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.order is None) == (self.matrix is None):
            raise ValueError("a rotation is given either by its Hadamard order or by its matrix")

    def apply(self, x: Tensor) -> Tensor:
        """x @ R for floating x [..., size], as a new tensor of x's dtype; computed in at least float32."""
        if self.order is None:
            return self._times(x, transpose=False)
        return apply_hadamard_(self._signed_(_copy(x)), self.order)

    def apply_transposed(self, x: Tensor) -> Tensor:
        """x @ R.T, which undoes `apply`; otherwise as `apply`."""
        if self.order is None:
            return self._times(x, transpose=True)
        return self._signed_(apply_hadamard_(_copy(x), self.order, transpose=True))

    def dense(self) -> Tensor:
        """R itself: float64 [size, size]."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def _signed_(self, x: Tensor) -> Tensor:
        return x if self.signs is None else x.mul_(self.signs)

    def _times(self, x: Tensor, *, transpose: bool) -> Tensor:
        assert self.matrix is not None
        dtype = torch.promote_types(x.dtype, torch.float32)
        matrix = self.matrix.to(dtype)
        return (x.to(dtype) @ (matrix.T if transpose else matrix)).to(x.dtype)


def draw_hadamard(n: int, generator: torch.Generator) -> Rotation:
    """Draw a Hadamard matrix over the whole width n, rows given random signs (QuaRot, Ashkboos et al. 2024).

    Raises UnsupportedError when no Hadamard matrix of order n can be built.
    """
    factor_order(n)
    return Rotation(n, signs=_random_signs(n, generator), order=n)


def draw_block_hadamard(n: int, block: int, generator: torch.Generator) -> Rotation:
    """Draw one Sylvester matrix per block of the width n, rows given random signs.

    Raises UsageError unless `block` is a power of two that divides n.
    """
    _check_block(n, block)
    return Rotation(n, signs=_random_signs(n, generator), order=block)


def make_plain_hadamard(n: int, order: int) -> Rotation:
    """Return Hadamard matrices without signs: one over the whole width n, or a Sylvester matrix per block.

    Raises UnsupportedError when no Hadamard matrix of order n can be built, UsageError unless a smaller
    order is a power of two that divides n.
    """
    if order == n:
        factor_order(n)
    else:
        _check_block(n, order)
    return Rotation(n, order=order)


def _check_block(n: int, block: int) -> None:
    fitting = power_of_two_divisors(n)[1:]
    if block not in fitting:
        raise UsageError(
            f"a Hadamard block of {block} does not fit a width of {n}",
            remedy=f"the powers of two that divide {n} are {', '.join(map(str, fitting))}",
        )


def draw_random_rotation(n: int, generator: torch.Generator) -> Rotation:
    """Draw a dense orthogonal matrix, uniform by Haar's measure.

    Q of the QR decomposition of a Gaussian matrix; making R's diagonal positive makes Q unique, hence uniform
    (Mezzadri 2007).
    """
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Rotation(n, matrix=q * torch.where(r.diagonal() < 0, -1.0, 1.0))


def _random_signs(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (n,), generator=generator).to(torch.float64) * 2 - 1


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
