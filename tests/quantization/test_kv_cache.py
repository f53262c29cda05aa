"""Keys and values as small integers: against the formula in float64, code by code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anequant.quantization.kv_cache import dequantize_states, quantize_states, round_states

seeds = st.integers(0, 1000)
widths = st.sampled_from([4, 8])


def states(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 5, 16, generator=generator) * scale
    x[..., 1] = x[..., 1] * 8 + 3
    return x


@given(seeds, widths, st.sampled_from([1e-3, 1.0, 500.0]))
def test_every_state_is_its_nearest_code(seed: int, bits: int, scale: float) -> None:
    x = states(seed, scale)
    stored = quantize_states(x, bits)
    low, step = stored.low.double(), stored.scale.double()
    grid = low + step * torch.arange(2**bits, dtype=torch.float64)
    expected = (x.double()[..., :, None] - grid[..., None, :]).abs().amin(-1)
    result = dequantize_states(stored, torch.float64)
    torch.testing.assert_close((x.double() - result).abs(), expected, rtol=1e-5, atol=1e-3 * scale)
    wanted = (x.amax(-1) - x.amin(-1)).double() / (2**bits - 1)
    torch.testing.assert_close(step[..., 0], wanted, rtol=2e-2, atol=0)


@given(seeds, widths)
def test_rounding_what_was_rounded_changes_nothing(seed: int, bits: int) -> None:
    once = round_states(states(seed), bits)
    torch.testing.assert_close(round_states(once, bits), once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bits", "codes"), [(8, 16), (4, 8)])
def test_what_is_stored(bits: int, codes: int) -> None:
    stored = quantize_states(states(0), bits)
    assert stored.codes.dtype == torch.uint8 and stored.codes.shape == (2, 3, 5, codes)
    assert stored.low.shape == stored.scale.shape == (2, 3, 5, 1)
    assert stored.nbytes == 2 * 3 * 5 * (codes + 4)


def test_two_codes_lie_in_a_byte_in_order() -> None:
    x = torch.arange(16.0).view(1, 1, 1, 16)
    assert quantize_states(x, 4).codes.flatten().tolist() == [2 * k | (2 * k + 1) << 4 for k in range(8)]


def test_tokens_and_heads_do_not_see_each_other() -> None:
    x = states(3)
    changed = x.clone()
    changed[1, 2, 4] *= 100
    same = torch.ones(2, 3, 5, dtype=torch.bool)
    same[1, 2, 4] = False
    assert torch.equal(round_states(x, 4)[same], round_states(changed, 4)[same])


def test_a_constant_state_stays_what_it_is() -> None:
    x = torch.full((1, 1, 2, 8), 0.75)
    assert torch.equal(round_states(x, 4), x)
    assert torch.equal(round_states(torch.zeros(1, 1, 2, 8), 8), torch.zeros(1, 1, 2, 8))


def test_gradients_pass_straight_through() -> None:
    x = states(4).requires_grad_()
    (round_states(x, 4) * 2).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 2))
