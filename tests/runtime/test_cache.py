"""The cache of small integers: what it holds, how many bytes that takes, and that models run the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quantized
from torch import Tensor
from transformers import DynamicCache

import anequant
from anequant.errors import UsageError
from anequant.quantization.kv_cache import round_states
from anequant.runtime.cache import QuantizedCache
from anequant.runtime.transformers_backend import TransformersModel

LENGTH = 33


@pytest.fixture(scope="module")
def open_model(tiny_qwen2: Path, quantize_model: Callable[..., Quantized]) -> Callable[..., Any]:
    """`open_model(dtype, kv_bits=..., ...)`."""

    def run(dtype: torch.dtype, **overrides: Any) -> Any:
        recipe = {"r3": "hadamard", **overrides}
        return anequant.load(quantize_model(tiny_qwen2, "w4-nearest", **recipe).folder, dtype=dtype)

    return run


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 1000, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def fed(model: Any, cache: Any, tokens: Tensor, sizes: list[int]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in tokens.split(sizes, 1)], 1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("prefix", [0, 3])
def test_bytes_are_codes_scales_and_lowest_values(
    open_model: Callable[..., Any], tokens: Tensor, bits: int, prefix: int
) -> None:
    options = {"activation_prefix": prefix, "activation_bits": 8} if prefix else {}
    model = open_model(torch.float16, kv_bits=bits, **options)
    cache = QuantizedCache(model.config)
    fed(model, cache, tokens, [20, 1, LENGTH - 21])
    floats = DynamicCache(config=model.config)
    fed(model, floats, tokens, [LENGTH])
    config = model.config
    states = 2 * len(tokens) * config.num_hidden_layers * config.num_key_value_heads
    head_dim = config.hidden_size // config.num_attention_heads
    small, whole = head_dim * bits // 8 + 4, 2 * head_dim
    assert cache.nbytes == states * (prefix * whole + (LENGTH - prefix) * small)
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in floats.layers)
    assert measured == states * LENGTH * whole and cache.nbytes < measured


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_runs_the_same_with_floats_and_with_integers(
    open_model: Callable[..., Any], tokens: Tensor, bits: int
) -> None:
    model = open_model(torch.float32, kv_bits=bits, activation_prefix=1, activation_bits=8)
    sizes = [9, 1, 1, LENGTH - 11]
    floats = fed(model, DynamicCache(config=model.config), tokens, sizes)
    assert torch.equal(fed(model, QuantizedCache(model.config), tokens, sizes), floats)
    cache = QuantizedCache(model.config)
    fed(model, cache, tokens, sizes)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same(open_model: Callable[..., Any], tokens: Tensor, beams: int) -> None:
    model = open_model(torch.float32, kv_bits=4)
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    cache = QuantizedCache(model.config)
    with torch.no_grad():
        ours = model.generate(tokens[:, :8], past_key_values=cache, **options)
        theirs = model.generate(tokens[:, :8], **options)
    assert torch.equal(ours, theirs) and ours.shape[1] > 8
    assert cache.nbytes > 0


def states(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(3, 2, length, 16, generator=generator)
    return keys, torch.randn(3, 2, length, 16, generator=generator)


@pytest.fixture
def cache(open_model: Callable[..., Any]) -> QuantizedCache:
    model = open_model(torch.float32, kv_bits=4, activation_prefix=2, activation_bits=8)
    return QuantizedCache(model.config)


def after_prefix(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :2], round_states(x[:, :, 2:], 4)], 2)


def test_what_is_held_can_be_cut_and_reordered(cache: QuantizedCache) -> None:
    keys, values = states(7)
    cache.update(keys[:, :, :1], values[:, :, :1], 0)
    cache.update(keys[:, :, 1:], values[:, :, 1:], 0)
    layer, order = cache.layers[0], torch.tensor([2, 0])
    layer.crop(-3)
    layer.batch_select_indices(order)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0]))
    more = tuple(part[[0, 2]] for part in states(1, seed=1))
    result = cache.update(*more, 0)
    for whole, part, added in zip(result, (keys, values), more, strict=True):
        expected = torch.cat([after_prefix(part)[[0, 2], :, :4], round_states(added, 4)], 2)
        assert torch.equal(whole, expected)
    layer.crop(-4)
    assert layer.get_seq_length() == 1 and layer.nbytes == 2 * 2 * 2 * 16 * 4
    with pytest.raises(ValueError, match="negative"):
        layer.crop(3)


def test_a_reset_cache_is_empty(cache: QuantizedCache) -> None:
    cache.update(*states(5), 0)
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    keys, values = states(4, seed=2)
    again = cache.update(keys, values, 0)
    assert torch.equal(again[0], after_prefix(keys)) and torch.equal(again[1], after_prefix(values))


def test_a_float_cache_is_not_one(tiny_qwen2: Path) -> None:
    with pytest.raises(UsageError, match="in float"):
        QuantizedCache(anequant.load(tiny_qwen2).config)


def test_the_text_backend_takes_it(tiny_qwen2: Path, quantize_model: Callable[..., Quantized]) -> None:
    folder = quantize_model(tiny_qwen2, "w4-nearest", r3="hadamard", kv_bits=4).folder
    decoder = TransformersModel(folder)
    tokens = list(range(10, 30))
    parts = [decoder.feed_each(tokens[:8]), *(decoder.feed([token])[None] for token in tokens[8:])]
    whole = fed(anequant.load(folder, dtype=torch.float32), None, torch.tensor([tokens]), [20])[0]
    assert isinstance(decoder._cache, QuantizedCache) and decoder._cache.get_seq_length() == 20
    assert (torch.cat(parts) - whole).norm() < 0.05 * whole.norm()
