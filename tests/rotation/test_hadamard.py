from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anequant.errors import UnsupportedError
from anequant.rotation.hadamard import apply_hadamard_, factor_order, hadamard, power_of_two_divisors

UNREACHED = [92, 116, 156, 172, 184, 188, 232, 236]
REACHED = [1, 2] + [n for n in range(4, 257, 4) if n not in UNREACHED]
MODEL_WIDTHS = [
    *(576, 896, 960, 1536, 2048, 2560, 2816, 3072, 3584, 4096, 4864, 5120, 5632, 6144, 8192, 8960, 9728),
    *(11008, 12288, 13824, 14336, 17408, 18944, 25600, 27648, 29568),
]

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def is_hadamard(matrix: torch.Tensor) -> bool:
    """Exact: entries are +-1, so float32 sums of at most 2^24 of them are integers without rounding."""
    n = len(matrix)
    product = matrix.float() @ matrix.float().T
    return (
        matrix.shape == (n, n)
        and matrix.dtype == torch.int8
        and bool((matrix.abs() == 1).all())
        and torch.equal(product, n * torch.eye(n))
    )


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_product(x: torch.Tensor, order: int, *, transpose: bool = False) -> torch.Tensor:
    matrix = hadamard(order).to(x.dtype)
    blocks = x.reshape(-1, order) @ (matrix.T if transpose else matrix)
    return (blocks / math.sqrt(order)).reshape(x.shape)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Construction


@pytest.mark.parametrize("n", [n for n in REACHED if n <= 128])
def test_every_reachable_order_to_128(n: int) -> None:
    assert is_hadamard(hadamard(n))


@pytest.mark.parametrize("n", [140, 148, 244, 344, 576, 896, 924, 960, 1536])
def test_larger_orders(n: int) -> None:
    assert is_hadamard(hadamard(n))


@pytest.mark.parametrize("q", [9, 25, 27, 49, 81, 121, 125, 169, 243, 343])
def test_prime_power_fields(q: int) -> None:
    """A wrong GF(p^k) would give a matrix of the right shape that is not Hadamard."""
    order = q + 1 if q % 4 == 3 else 2 * (q + 1)
    for base in {factor for factor in factor_order(order) if factor > 2}:
        assert is_hadamard(hadamard(base))
    assert is_hadamard(hadamard(order))


def test_sylvester_by_hand() -> None:
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert hadamard(4).tolist() == expected
    assert hadamard(1).tolist() == [[1]]


def test_paley_symmetry() -> None:
    skew = hadamard(28) - torch.eye(28, dtype=torch.int8)
    assert torch.equal(skew, -skew.T)
    assert torch.equal(hadamard(76), hadamard(76).T)


def test_results_are_the_callers_own() -> None:
    hadamard(12).zero_()
    assert is_hadamard(hadamard(12))


# Decomposition


@pytest.mark.parametrize("width", MODEL_WIDTHS)
def test_every_model_width_decomposes(width: int) -> None:
    factors = factor_order(width)
    assert math.prod(factors) == width
    bases = [factor for factor in factors if factor != 2]
    assert list(factors) == bases + [2] * (len(factors) - len(bases))
    for base in bases:
        assert is_hadamard(hadamard(base))


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        (1, ()),
        (64, (2,) * 6),
        (896, (28,) + (2,) * 5),
        (4864, (76,) + (2,) * 6),
        (11008, (344,) + (2,) * 5),
        (144, (12, 12)),
        (240, (12, 20)),
        (27648, (12, 12, 12) + (2,) * 4),
        (29568, (12, 28, 44, 2)),
    ],
)
def test_chosen_factors(n: int, factors: tuple[int, ...]) -> None:
    assert factor_order(n) == factors


@few
@given(st.sampled_from(REACHED), st.sampled_from(REACHED))
def test_products_are_reachable_and_never_cost_more(a: int, b: int) -> None:
    def cost(n: int) -> int:
        return sum(factor for factor in factor_order(n) if factor != 2)

    assert math.prod(factor_order(a * b)) == a * b
    assert cost(a * b) <= cost(a) + cost(b)


def test_unreached_orders_are_exactly_the_known_ones() -> None:
    def reached(n: int) -> bool:
        try:
            return bool(factor_order(n))
        except UnsupportedError:
            return False

    assert [n for n in range(4, 257, 4) if not reached(n)] == UNREACHED
    assert not any(reached(n) for n in range(3, 257) if n % 4)


@pytest.mark.parametrize("call", [factor_order, hadamard, lambda n: apply_hadamard_(torch.ones(n), n)])
@pytest.mark.parametrize("n", [*UNREACHED, 450, 451])
def test_unreached_orders_name_the_blocks_that_fit(call: Callable[[int], object], n: int) -> None:
    blocks = {4: "(1, 2, 4)", 0: "(1, 2, 4, 8)", 2: "(1, 2)", 3: "(1)"}[n % 8]
    with pytest.raises(UnsupportedError) as caught:
        call(n)
    assert f"order {n} " in caught.value.what
    assert blocks in caught.value.remedy


@pytest.mark.parametrize("n", [0, -4])
def test_orders_are_positive(n: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        factor_order(n)


@given(st.integers(1, 10**6))
def test_power_of_two_divisors(n: int) -> None:
    expected = [2**k for k in range(21) if n % 2**k == 0]
    assert list(power_of_two_divisors(n)) == expected


# Fast application


@pytest.mark.parametrize("order", [1, 2, 12, 24, 28, 44, 64, 76, 128, 144, 256, 344, 896])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_fast_equals_dense(order: int, transpose: bool, blocks: int) -> None:
    x = gaussian(2, 3, order * blocks)
    expected = dense_product(x, order, transpose=transpose)
    result = apply_hadamard_(x, order, transpose=transpose)
    assert result is x
    assert_close(x, expected)


def test_many_rows_are_many_slices() -> None:
    x = gaussian(5000, 128)
    expected = dense_product(x, 64)
    assert_close(apply_hadamard_(x, 64), expected)


@few
@given(st.sampled_from([n for n in REACHED if n <= 128]), st.integers(1, 3), seeds)
def test_transposed_undoes_and_norms_stay(order: int, blocks: int, seed: int) -> None:
    x = gaussian(4, order * blocks, seed=seed)
    turned = apply_hadamard_(x.clone(), order)
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert_close(apply_hadamard_(turned, order, transpose=True), x)


@few
@given(st.sampled_from([12, 28, 64, 76]), seeds, st.floats(-3, 3))
def test_linear(order: int, seed: int, factor: float) -> None:
    x, y = gaussian(2, 3, order, seed=seed)
    separately = apply_hadamard_(x.clone(), order) + factor * apply_hadamard_(y.clone(), order)
    assert_close(apply_hadamard_(x + factor * y, order), separately)


@pytest.mark.parametrize("width", [18944, 27648, 29568])
def test_wide_rows_without_the_dense_matrix(width: int) -> None:
    x = gaussian(3, width)
    turned = apply_hadamard_(x.clone(), width)
    assert not torch.allclose(turned, x)
    assert_close(apply_hadamard_(turned, width, transpose=True), x)


def test_an_outlier_is_spread_evenly() -> None:
    x = torch.zeros(896, dtype=torch.float64)
    x[5] = 30.0
    assert_close(apply_hadamard_(x, 896).abs(), torch.full_like(x, 30.0 / math.sqrt(896)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_narrow_floats(dtype: torch.dtype, tolerance: float) -> None:
    x = gaussian(5, 896, dtype=torch.float32).to(dtype)
    expected = dense_product(x.double(), 896)
    result = apply_hadamard_(x, 896)
    assert result.dtype == dtype
    assert_close(result.double(), expected, tolerance)


def test_differentiable_even_after_inference_mode() -> None:
    with torch.inference_mode():
        apply_hadamard_(torch.ones(60), 60)
    x = gaussian(2, 60).float().requires_grad_()
    (gradient,) = torch.autograd.grad(apply_hadamard_(x * 1, 60)[:, 0].sum(), x)
    assert_close(gradient, hadamard(60)[:, 0].expand(2, 60) / math.sqrt(60), 1e-6)


def test_block_must_divide_the_width() -> None:
    """96 * 2 elements are three blocks of 64, but no row is."""
    with pytest.raises(ValueError, match="64 does not divide a width of 96"):
        apply_hadamard_(torch.ones(2, 96), 64)


def test_rows_that_cannot_be_viewed_as_blocks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="view"):
        apply_hadamard_(torch.ones(64, 64).T, 32)
