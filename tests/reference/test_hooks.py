"""What is attached to transformers' layers: where it acts, and that rotations alone change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from anequant.checkpoints.reader import open_checkpoint
from anequant.quantization.activations import ActivationFormat, round_activations
from anequant.quantization.kv_cache import round_states
from anequant.quantization.online import Online
from anequant.reference.hooks import attach_all, set_input_scale
from anequant.rotation.orthogonal import make_plain_hadamard

WINDOW = 12


@pytest.fixture(params=["qwen2", "qwen3"], scope="module")
def folder(
    request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_model(tmp_path_factory.mktemp("hooks") / request.param, request.param, False)


@pytest.fixture
def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture
def attached(folder: Path) -> Callable[[Online], Any]:
    spec = open_checkpoint(folder).spec

    def run(online: Online) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        attach_all(model, spec, online)
        return model

    return run


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 97, (2, WINDOW), generator=torch.Generator().manual_seed(1))


def logits(model: Any, tokens: Tensor, cache: Any = None) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens, past_key_values=cache, use_cache=cache is not None).logits
    return result


def arriving(model: Any, tokens: Tensor, name: str) -> Tensor:
    """What the linear of that full name multiplies."""
    seen: list[Tensor] = []
    linear = model.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    logits(model, tokens)
    handle.remove()
    return seen[0]


def test_r3_alone_changes_nothing(stock: Any, attached: Callable[..., Any], tokens: Tensor) -> None:
    head_dim = stock.model.layers[0].self_attn.head_dim
    turned = attached(Online(r3=make_plain_hadamard(head_dim, head_dim)))
    cache, plain = DynamicCache(config=stock.config), DynamicCache(config=stock.config)
    torch.testing.assert_close(
        logits(turned, tokens, cache), logits(stock, tokens, plain), rtol=0, atol=1e-10
    )
    assert (cache.layers[1].keys - plain.layers[1].keys).abs().max() > 0.1
    torch.testing.assert_close(cache.layers[1].values, plain.layers[1].values)


def test_r4_alone_changes_nothing_once_it_is_folded(
    stock: Any, attached: Callable[..., Any], tokens: Tensor
) -> None:
    r4 = make_plain_hadamard(192, 64)
    turned = attached(Online(r4=r4))
    for layer in turned.model.layers:
        layer.mlp.down_proj.weight.data = r4.apply(layer.mlp.down_proj.weight.data)
    torch.testing.assert_close(logits(turned, tokens), logits(stock, tokens), rtol=0, atol=1e-10)
    name = "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(arriving(turned, tokens, name), arriving(stock, tokens, name) @ r4.dense())


@pytest.mark.parametrize("prefix", [0, 3])
def test_inputs_are_rounded_where_they_are_named(
    stock: Any, attached: Callable[..., Any], tokens: Tensor, prefix: int
) -> None:
    format_ = ActivationFormat(4)
    name, other = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
    model = attached(Online(activations={name: format_}, prefix=prefix))
    scale = torch.rand(1, stock.config.hidden_size, generator=torch.Generator().manual_seed(2)) + 0.5
    set_input_scale(model.get_submodule(name), scale)
    before = arriving(stock, tokens, name)
    assert torch.equal(arriving(model, tokens, other), before)
    expected = round_activations(before * scale, format_) / scale
    expected[:, :prefix] = before[:, :prefix]
    torch.testing.assert_close(arriving(model, tokens, name), expected, rtol=0, atol=0)
    assert (expected - before).abs().max() > 0.05


@pytest.mark.parametrize("prefix", [0, 2])
def test_keys_and_values_are_rounded_on_their_way_into_the_cache(
    stock: Any, attached: Callable[..., Any], tokens: Tensor, prefix: int
) -> None:
    plain, cache = DynamicCache(config=stock.config), DynamicCache(config=stock.config)
    logits(stock, tokens, plain)
    model = attached(Online(kv_bits=4, prefix=prefix))
    for part in tokens.split([1, 5, WINDOW - 6], 1):
        logits(model, part, cache)
    for part in ("keys", "values"):
        ours, theirs = (getattr(held.layers[0], part) for held in (cache, plain))
        expected = round_states(theirs, 4)
        expected[:, :, :prefix] = theirs[:, :, :prefix]
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        assert (expected - theirs).abs().max() > 1e-3


def test_without_a_cache_attention_reads_rounded_states_too(
    attached: Callable[..., Any], tokens: Tensor, stock: Any
) -> None:
    model = attached(Online(kv_bits=4))
    with_cache = logits(model, tokens, DynamicCache(config=stock.config))
    torch.testing.assert_close(logits(model, tokens), with_cache, rtol=1e-10, atol=1e-10)
    assert (with_cache - logits(stock, tokens)).abs().max() > 1e-3
