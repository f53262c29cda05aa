from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anequant.errors import UnsupportedError, UsageError
from anequant.rotation.hadamard import hadamard
from anequant.rotation.orthogonal import (
    Rotation,
    draw_block_hadamard,
    draw_hadamard,
    draw_random_rotation,
)

Maker = Callable[[int, torch.Generator], Rotation]


def block_of_four(n: int, generator: torch.Generator) -> Rotation:
    return draw_block_hadamard(n, 4, generator)


MAKERS: list[Maker] = [draw_hadamard, block_of_four, draw_random_rotation]

each_maker = pytest.mark.parametrize("maker", MAKERS)
few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([4, 12, 28, 40, 64, 76])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@few
@given(st.sampled_from(MAKERS), sizes, seeds)
def test_orthogonal_and_applied_as_its_dense_matrix(maker: Maker, n: int, seed: int) -> None:
    rotation = maker(n, seeded(seed))
    matrix = rotation.dense()
    assert rotation.size == n
    assert matrix.dtype == torch.float64
    assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
    x = gaussian(2, 3, n, seed=seed)
    assert_close(rotation.apply(x), x @ matrix)
    assert_close(rotation.apply_transposed(x), x @ matrix.T)
    assert_close(rotation.apply_transposed(rotation.apply(x)), x)
    assert_close(rotation.apply(x).norm(dim=-1), x.norm(dim=-1))


def test_structure_is_signs_times_hadamard() -> None:
    for rotation, blocks in [(draw_hadamard(28, seeded(3)), 1), (block_of_four(28, seeded(3)), 7)]:
        order = 28 // blocks
        mixing = torch.kron(torch.eye(blocks), hadamard(order)).double() / order**0.5
        assert rotation.signs is not None
        assert set(rotation.signs.tolist()) == {-1.0, 1.0}
        assert_close(rotation.dense(), torch.diag(rotation.signs) @ mixing)


def test_signs_are_optional() -> None:
    assert_close(Rotation(12, order=12).dense(), hadamard(12).double() / 12**0.5)
    x = gaussian(12)
    assert_close(Rotation(12, order=12).apply_transposed(Rotation(12, order=12).apply(x)), x)


@each_maker
def test_reading_and_writing_weights_cancel(maker: Maker) -> None:
    """(x R) (W R)^T == x W^T for a reader, and (R^T W)^T gives a writer's output turned by R."""
    rotation = maker(28, seeded(5))
    x, reader, writer = gaussian(6, 28), gaussian(10, 28, seed=2), gaussian(28, 10, seed=3)
    assert_close(rotation.apply(x) @ rotation.apply(reader).T, x @ reader.T)
    turned_writer = rotation.apply(writer.T).T
    assert_close(turned_writer, rotation.dense().T @ writer)
    inputs = gaussian(6, 10, seed=4)
    assert_close(inputs @ turned_writer.T, rotation.apply(inputs @ writer.T))


@each_maker
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_the_input_untouched(maker: Maker, dtype: torch.dtype) -> None:
    rotation = maker(12, seeded(0))
    x = gaussian(5, 12).to(dtype)
    before = x.clone()
    for result, matrix in [
        (rotation.apply(x), rotation.dense()),
        (rotation.apply_transposed(x), rotation.dense().T),
    ]:
        assert result.dtype == dtype
        assert result.data_ptr() != x.data_ptr()
        assert_close(result.double(), x.double() @ matrix, 8 * torch.finfo(dtype).eps)
    assert torch.equal(x, before)


@each_maker
def test_strided_input(maker: Maker) -> None:
    rotation = maker(12, seeded(0))
    x = gaussian(12, 5).T
    assert_close(rotation.apply(x), x @ rotation.dense())
    assert_close(rotation.apply_transposed(x[0]), x[0] @ rotation.dense().T)


@each_maker
def test_the_seed_decides(maker: Maker) -> None:
    first, again, other = (maker(28, seeded(seed)).dense() for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@each_maker
def test_the_global_generator_is_not_touched(maker: Maker) -> None:
    before = torch.get_rng_state()
    maker(28, seeded(7))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_rotation_is_centred() -> None:
    """Without the sign fix, LAPACK's Householder QR leaves the first diagonal entry always negative."""
    generator = seeded(0)
    corners = torch.stack([draw_random_rotation(3, generator).dense().diagonal() for _ in range(400)])
    assert (corners.mean(dim=0).abs() < 4 / (3 * 400) ** 0.5).all()


@pytest.mark.parametrize("block", [0, 1, -4, 3, 12, 24, 64])
def test_block_that_does_not_fit(block: int) -> None:
    with pytest.raises(UsageError) as caught:
        draw_block_hadamard(96, block, seeded(0))
    assert f"block of {block} does not fit a width of 96" in str(caught.value)
    assert "the powers of two that divide 96 are 2, 4, 8, 16, 32" in str(caught.value)


@pytest.mark.parametrize("block", [2, 4, 8, 16, 32])
def test_every_block_that_fits(block: int) -> None:
    matrix = draw_block_hadamard(96, block, seeded(0)).dense()
    inside = torch.kron(torch.eye(96 // block), torch.ones(block, block)).bool()
    assert torch.equal(matrix != 0, inside)


def test_unreached_width() -> None:
    with pytest.raises(UnsupportedError, match="order 92"):
        draw_hadamard(92, seeded(0))


def test_one_form_and_only_one() -> None:
    with pytest.raises(ValueError, match="either"):
        Rotation(4)
    with pytest.raises(ValueError, match="either"):
        Rotation(4, order=4, matrix=torch.eye(4, dtype=torch.float64))
