"""Products against float64, and where bfloat16 is let in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from anequant.quantization.products import (
    SQUARE_BLOCK,
    add_product,
    add_square,
    bfloat16_products,
    has_bfloat16,
    mirror,
    product,
)


def some(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def off(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


def test_products_are_those_of_float64() -> None:
    left, right, total = some(70, 130), some(130, 50), some(70, 50)
    exact = left.double() @ right.double()
    assert off(product(left, right), exact) < 1e-6
    assert off(product(right.T, left.T), exact.T) < 1e-6
    wanted = total.double() + exact
    add_product(total, left, right)
    assert off(total, wanted) < 1e-6


@pytest.mark.parametrize("size", [130, SQUARE_BLOCK, 3 * SQUARE_BLOCK - 7])
def test_squares_are_those_of_float64(size: int) -> None:
    rows, total = some(70, size), torch.zeros(size, size)
    for part in rows.split(40):
        add_square(total, part)
    exact = rows.double().T @ rows.double()
    assert off(total.tril(), exact.tril()) < 1e-6
    mirror(total)
    assert off(total, exact) < 1e-6 and torch.equal(total, total.T)


def test_bfloat16_is_for_torchs_products_inside() -> None:
    rows, weight = some(300, 256), some(200, 256)
    total, square = torch.zeros(300, 200), torch.zeros(256, 256)

    def all_products(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, w = rows.to(dtype).double(), weight.to(dtype).double()
        return x @ w.T, (x.T @ x).tril()

    exact, exact_square = all_products(torch.float32)
    coarse, coarse_square = all_products(torch.bfloat16 if has_bfloat16() else torch.float32)
    with bfloat16_products():
        inside, beside = linear(rows, weight), product(rows, weight.T)
        add_product(total, rows, weight.T)
        add_square(square, rows)
    assert off(inside, coarse) < 1e-6 and off(total, coarse) < 1e-6
    assert off(square.tril(), coarse_square) < 1e-6
    assert off(beside, exact) < 1e-6 and off(linear(rows, weight), exact) < 1e-6
    after = torch.zeros(256, 256)
    add_square(after, rows)
    assert off(after.tril(), exact_square) < 1e-6


def test_an_error_ends_bfloat16() -> None:
    rows, weight = some(300, 256), some(200, 256)
    with pytest.raises(ZeroDivisionError), bfloat16_products():
        raise ZeroDivisionError
    assert off(linear(rows, weight), rows.double() @ weight.double().T) < 1e-6
