"""Products against float64, and where bfloat16 is let in."""

from __future__ import annotations

import platform

import pytest
import torch
from running import execute_python
from torch import Tensor
from torch.nn.functional import linear

from anequant.quantization import products
from anequant.quantization.products import (
    SQUARE_BLOCK,
    add_product,
    add_square,
    allow_bfloat16,
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


@pytest.fixture(params=[True, False], ids=["as-probed", "without-bfloat16"])
def rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether products may be rounded: what this processor does, and a stub of one that does not."""
    if not request.param:
        monkeypatch.setattr(products, "has_bfloat16", lambda: False)
        monkeypatch.setattr(products, "has_slow_blas", lambda: False)
    return products.has_bfloat16()


def test_bfloat16_is_for_torchs_products_inside(rounds: bool) -> None:
    rows, weight = some(300, 256), some(200, 256)
    total, square = torch.zeros(300, 200), torch.zeros(256, 256)

    def all_products(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, w = rows.to(dtype).double(), weight.to(dtype).double()
        return x @ w.T, (x.T @ x).tril()

    exact, exact_square = all_products(torch.float32)
    coarse, coarse_square = all_products(torch.bfloat16 if rounds else torch.float32)
    with allow_bfloat16():
        inside, beside = linear(rows, weight), product(rows, weight.T)
        add_product(total, rows, weight.T)
        add_square(square, rows)
    assert off(inside, coarse) < 1e-6 and off(total, coarse) < 1e-6
    assert off(square.tril(), coarse_square) < 1e-6
    assert off(beside, exact) < 1e-6 and off(linear(rows, weight), exact) < 1e-6
    after = torch.zeros(256, 256)
    add_square(after, rows)
    assert off(after.tril(), exact_square) < 1e-6


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("rounds", [True, False])
def test_either_reason_leaves_the_blas(monkeypatch: pytest.MonkeyPatch, rounds: bool, slow: bool) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: rounds)
    monkeypatch.setattr(products, "has_slow_blas", lambda: slow)
    assert torch.get_float32_matmul_precision() == "highest"
    with allow_bfloat16():
        assert torch.get_float32_matmul_precision() == ("medium" if rounds or slow else "highest")
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("processor", "mkl", "slow"),
    [
        ("znver4", True, True),
        ("znver5", True, True),
        ("znver4", False, False),
        ("sapphirerapids", True, False),
    ],
)
def test_mkl_is_slow_on_amd(monkeypatch: pytest.MonkeyPatch, processor: str, mkl: bool, slow: bool) -> None:
    monkeypatch.setattr(products, "get_host_cpu_name", lambda: processor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert products.has_slow_blas.__wrapped__() == slow


def test_the_probe_asks_the_arithmetic() -> None:
    """In a process whose oneDNN may use AVX-512's bfloat16 but not AMX, as on a processor without it: the
    flags say bfloat16, and products are those of float32."""
    script = """
import torch
from anequant.quantization.products import has_bfloat16
rows, weight = torch.randn(300, 256), torch.randn(200, 256)
torch.set_float32_matmul_precision("medium")
exact = rows.double() @ weight.double().T
print(has_bfloat16(), float((torch.nn.functional.linear(rows, weight) - exact).norm() / exact.norm()))
assert torch.get_float32_matmul_precision() == "medium"
"""
    ran = execute_python(script, env={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"})
    assert ran.exit_code == 0, ran.stderr
    has, error = ran.stdout.split()
    assert (has == "True") == (float(error) > 1e-4), ran.stdout
    assert has == "False" or platform.machine() not in ("x86_64", "AMD64")


def test_an_error_ends_bfloat16() -> None:
    rows, weight = some(300, 256), some(200, 256)
    with pytest.raises(ZeroDivisionError), allow_bfloat16():
        raise ZeroDivisionError
    assert off(linear(rows, weight), rows.double() @ weight.double().T) < 1e-6
