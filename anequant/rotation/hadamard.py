"""Hadamard matrices: square, entries +1 and -1, rows mutually orthogonal, so H @ H.T == n * I.

Where they come from. All constructions give exact integers; none is read from a table.

- *Sylvester* (1867): the order 2 matrix S = [[1, 1], [1, -1]].
- *Kronecker product*: if A and B are Hadamard of orders a and b, so is kron(A, B), of order a * b, because
  kron(A, B) @ kron(A, B).T == kron(A @ A.T, B @ B.T) == a * b * I. Powers of S give every order 2^k.
- *Paley* (1933). Let q be an odd prime power and chi the quadratic character of the field GF(q): 0 at 0,
  +1 at the other squares, -1 elsewhere. The sum of chi(b) over all b is 0, and that of chi(b) * chi(b + c) is
  -1 for every c != 0, so Q[a, b] = chi(a - b) has zero row sums and Q @ Q.T == q * I - J with J all ones.
  Bordering Q makes a conference matrix C of order q + 1, with zero diagonal and C @ C.T == q * I:
    - I, q = 3 (mod 4): -1 is not a square, so Q and C = [[0, 1], [-1, Q]] are skew, and I + C is Hadamard of
      order q + 1: (I + C) @ (I + C).T == (I + C) @ (I - C) == I + C @ C.T.
    - II, q = 1 (mod 4): -1 is a square, so Q and C = [[0, 1], [1, Q]] are symmetric, and
      kron(C, [[1, 1], [1, -1]]) + kron(I, [[1, -1], [-1, -1]]) is Hadamard of order 2 * (q + 1): the two
      matrices of order 2 are orthogonal and anticommute, which cancels the cross terms.

Why the structured application is cheap. View a row of length a * b as an a x b matrix X: multiplying by
kron(A, B) is A.T @ X @ B, which costs a * b * (a + b) instead of (a * b)^2. Over all the factors of
n = m * 2^k that is O(n * (m + log 2^k)) per row. On a CPU one dense product with kron(A, B) is faster than
two passes while it is small (a power of S: as fast as its butterflies in float64, four times in float32), so
neighbouring factors are multiplied out up to order 128.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache, reduce

import torch
from torch import Tensor

from anequant.errors import UnsupportedError

_WIDEST_PASS = 128
_ELEMENTS_PER_SLICE = 2**18
"""Rows are transformed a slice at a time, so that all passes over a slice stay in the cache."""


def power_of_two_divisors(n: int) -> tuple[int, ...]:
    """Return the powers of two that divide n >= 1, ascending: the block sizes that fit a width of n."""
    return tuple(2**k for k in range((n & -n).bit_length()))


def factor_order(n: int) -> tuple[int, ...]:
    """Return orders whose Kronecker product is the Hadamard matrix of order n: Paley orders first, then 2s.

    Of all decompositions the one with the smallest sum of Paley orders, which is the cheapest to apply.
    Raises UnsupportedError when no decomposition exists, ValueError when n < 1.
    """
    if n < 1:
        raise ValueError(f"the order of a Hadamard matrix is positive, not {n}")
    orders = _paley_orders(n)
    if orders is None:
        blocks = ", ".join(map(str, power_of_two_divisors(n)))
        raise UnsupportedError(
            f"no Hadamard matrix of order {n} can be constructed",
            where="known are 2, Paley's q + 1 and 2 * (q + 1) for prime powers q, and products of these",
            remedy=f"use blocks of a power of two that divides {n} ({blocks}), or a random rotation",
        )
    twos = (n // math.prod(orders)).bit_length() - 1
    return orders + (2,) * twos


def hadamard(n: int) -> Tensor:
    """Return the dense Hadamard matrix of order n: int8 [n, n], entries +1 and -1. Errors: see
    factor_order."""
    return _kronecker(factor_order(n))


def orthonormal_factors(order: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return orthonormal matrices whose Kronecker product, in this order, is H / sqrt(order). Errors:
    factor_order.

    None is wider than 128, unless a Paley matrix is.
    """
    return tuple(_orthonormal(factors, dtype) for factors in _passes(order))


def apply_hadamard_(x: Tensor, order: int, *, transpose: bool = False) -> Tensor:
    """Set x to x @ kron(I, H) / sqrt(order) along the last axis, with `transpose` H.T in the place of H.

    x: floating, contiguous, [..., n] with n a multiple of `order`: order == n mixes the whole width, a
    smaller order each block of that size on its own. Computed in x's dtype, but at least float32. Returns x.
    Temporary memory is a few megabytes or a few rows, whichever is larger.
    Errors: see factor_order; ValueError when `order` does not divide n; RuntimeError when x cannot be viewed.
    """
    if x.shape[-1] % order:
        raise ValueError(f"a Hadamard block of {order} does not divide a width of {x.shape[-1]}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    matrices = [matrix.to(x.device) for matrix in orthonormal_factors(order, dtype)]
    if transpose:
        matrices = [matrix.T for matrix in matrices]
    blocks = x.view(-1, order)
    step = max(1, _ELEMENTS_PER_SLICE // order)
    for start in range(0, len(blocks), step):
        rows = blocks[start : start + step]
        rows.copy_(_multiply(rows.to(dtype), matrices))
    return x


def _multiply(rows: Tensor, matrices: list[Tensor]) -> Tensor:
    """rows @ kron(*matrices) for rows [r, n], one factor at a time, as a new tensor or `rows` itself."""
    result, inner = rows, rows.shape[-1]
    for matrix in matrices:
        size = len(matrix)
        inner //= size
        if inner == 1:
            result = result.reshape(-1, size) @ matrix
        else:
            result = matrix.T @ result.reshape(-1, size, inner)
    return result.reshape(rows.shape)


@lru_cache(maxsize=64)
def _passes(order: int) -> tuple[tuple[int, ...], ...]:
    """factor_order in groups of neighbours, each of a product up to the widest pass or of one factor."""
    passes: list[tuple[int, ...]] = []
    for factor in reversed(factor_order(order)):
        if passes and factor * math.prod(passes[0]) <= _WIDEST_PASS:
            passes[0] = (factor, *passes[0])
        else:
            passes.insert(0, (factor,))
    return tuple(passes)


@lru_cache(maxsize=16)
def _orthonormal(factors: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """H / sqrt(n) of these factors, usable under autograd whatever the mode it was first asked for in."""
    with torch.inference_mode(False):
        return _kronecker(factors).to(dtype) / math.sqrt(math.prod(factors))


def _kronecker(factors: tuple[int, ...]) -> Tensor:
    matrices = (_sylvester() if order == 2 else _paley(order) for order in factors)
    return reduce(torch.kron, matrices, torch.ones(1, 1, dtype=torch.int8))


@lru_cache(maxsize=4096)
def _paley_orders(n: int) -> tuple[int, ...] | None:
    """Paley orders of the smallest sum whose product times a power of two is n; None if there are none."""
    if n & (n - 1) == 0:
        return ()
    candidates = []
    for order in range(12, n + 1, 4):
        if n % order == 0 and order & (order - 1) and _paley_field(order):
            rest = _paley_orders(n // order)
            if rest is not None:
                candidates.append(tuple(sorted((order, *rest))))
    return min(candidates, key=sum, default=None)


def _paley_field(order: int) -> int | None:
    """Return the q of Paley's construction of this order: q = 3 (mod 4) is the first, q = 1 (mod 4) the
    second."""
    if order % 4 == 0 and _prime_power(order - 1):
        return order - 1
    if order % 8 == 4 and _prime_power(order // 2 - 1):
        return order // 2 - 1
    return None


@lru_cache(maxsize=16)
def _paley(order: int) -> Tensor:
    """Return Paley's matrix: int8 [order, order]."""
    q = _paley_field(order)
    assert q is not None
    skew = q % 4 == 3
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if skew else 1
    conference[1:, 1:] = _character_of_differences(q)
    identity = torch.eye(q + 1, dtype=torch.int8)
    if skew:
        return conference + identity
    other = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, _sylvester()) + torch.kron(identity, other)


def _sylvester() -> Tensor:
    return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)


def _character_of_differences(q: int) -> Tensor:
    """Return Paley's Q[a, b] = chi(a - b) over GF(q), q odd: int8 [q, q].

    Element number i has the base-p digits of i as its coefficients.
    """
    field = _prime_power(q)
    assert field is not None
    p, k = field
    places = p ** torch.arange(k)
    powers = torch.tensor(_powers_of_generator(p, k)) @ places
    chi = torch.zeros(q, dtype=torch.int8)
    chi[powers[0::2]] = 1
    chi[powers[1::2]] = -1
    difference = torch.zeros(q, q, dtype=torch.int64)
    for place in places:
        digit = torch.arange(q) // place % p
        difference += (digit[:, None] - digit) % p * place
    return chi[difference]


def _powers_of_generator(p: int, k: int) -> list[tuple[int, ...]]:
    """x^0, x^1, ..., x^(q-2) in GF(q = p^k): every nonzero element once, as k coefficients, constant first.

    Searches for a polynomial x^k - t(x) modulo which the powers of x run through all q - 1 nonzero residues.
    Then all of these are units, so the residues are a field, and its squares are the even powers of x.
    """
    one = (1,) + (0,) * (k - 1)
    for tail in itertools.product(range(1, p), *[range(p)] * (k - 1)):
        powers = [one]
        while (power := _times_x(powers[-1], tail, p)) != one:
            powers.append(power)
        if len(powers) == p**k - 1:
            return powers
    raise AssertionError(f"GF({p}^{k}) has a generator")


def _times_x(element: tuple[int, ...], tail: tuple[int, ...], p: int) -> tuple[int, ...]:
    """x * element modulo p and x^k = tail(x)."""
    *low, top = element
    return tuple((shifted + top * t) % p for shifted, t in zip((0, *low), tail, strict=True))


@lru_cache(maxsize=4096)
def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q == p**k and p prime, or None; q >= 2."""
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None
