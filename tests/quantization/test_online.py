"""What a recipe says of a running model, and codebooks that integers can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anequant.architectures.spec import ModelSpec
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import BUNDLED_MODEL
from anequant.errors import UsageError
from anequant.quantization.activations import ActivationFormat
from anequant.quantization.codebook import codebook_step, lloyd_max, round_to_integers
from anequant.quantization.online import NOTHING, Online, plan_online
from anequant.recipe_files import load_recipe

few = settings(max_examples=50, deadline=None)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return open_checkpoint(BUNDLED_MODEL).spec


def planned(spec: ModelSpec, **overrides: Any) -> Online:
    return plan_online(spec, load_recipe("w4-nearest", overrides))


def test_a_recipe_for_weights_alone_runs_nothing(spec: ModelSpec) -> None:
    assert planned(spec) == NOTHING and not NOTHING.active


def test_every_projection_is_named_and_overrides_win(spec: ModelSpec) -> None:
    online = planned(
        spec,
        activation_bits=8,
        activation_overrides="down_proj=16, o_proj=4",
        activation_symmetric=False,
        activation_clip=0.9,
        activation_prefix=2,
        kv_bits=4,
    )
    layers = range(spec.num_layers)
    of_layer = {
        "mlp.gate_proj": 8,
        "mlp.up_proj": 8,
        "self_attn.q_proj": 8,
        "self_attn.k_proj": 8,
        "self_attn.v_proj": 8,
        "self_attn.o_proj": 4,
    }
    assert online.activations == {
        f"model.layers.{layer}.{name}": ActivationFormat(bits, False, 0.9)
        for layer in layers
        for name, bits in of_layer.items()
    }
    assert (online.prefix, online.kv_bits, online.r3, online.r4) == (2, 4, None, None)
    assert online.active and not online.rotations.active


def test_an_override_alone_rounds_one_projection(spec: ModelSpec) -> None:
    names = planned(spec, activation_overrides="down_proj=8").activations
    assert {name.split(".", 3)[3] for name in names} == {"mlp.down_proj"}


def test_rotations_are_hadamard_matrices_of_the_width_or_its_blocks(spec: ModelSpec) -> None:
    online = planned(spec, r3="hadamard", r4="hadamard")
    assert online.r3 is not None and online.r4 is not None
    for rotation, size in ((online.r3, spec.head_dim), (online.r4, spec.intermediate_size)):
        matrix = rotation.apply(torch.eye(size, dtype=torch.float64))
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
        assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    block = planned(spec, r4="block-hadamard", r4_block=32).r4
    assert block is not None
    matrix = block.apply(torch.eye(spec.intermediate_size, dtype=torch.float64))
    assert int((matrix != 0).sum()) == 32 * spec.intermediate_size


def test_scales_are_given_by_name(spec: ModelSpec) -> None:
    online = planned(spec, activation_bits=8, activation_scales="static")
    first, *rest = online.activations
    scaled = online.with_scales({first: 0.25}).activations
    assert scaled[first].scale == 0.25 and all(scaled[name].scale is None for name in rest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embed=8", "activation_overrides names 'embed'"),
        ("down_proj=5", "'down_proj' 5 bits"),
        ("down_proj", "'down_proj' 0 bits"),
    ],
)
def test_impossible_overrides_are_refused(spec: ModelSpec, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(spec, activation_overrides=text)


@few
@given(st.lists(st.floats(-60000, 60000, width=16), min_size=2, max_size=16, unique=True))
def test_an_integer_codebook_is_an_ascending_int8_one(entries: list[float]) -> None:
    codebook = torch.tensor(sorted(entries))
    if len(codebook.unique()) < 2 or float(codebook.abs().max()) < 2.0**-10:
        return
    result, step = round_to_integers(codebook), codebook_step(codebook)
    integers = result.double() / step
    assert torch.equal(integers, integers.round()) and float(integers.abs().max()) <= 128
    assert bool((result.diff() > 0).all())
    assert torch.log2(torch.tensor(step)) == torch.log2(torch.tensor(step)).round()
    assert step == codebook_step(result) or float(integers.abs().max()) < 64


def test_integers_cost_a_gaussian_codebook_little() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    codebook = lloyd_max(values, 4)

    def error(entries: torch.Tensor) -> float:
        return float((values[:, None] - entries).abs().amin(1).square().mean())

    assert error(codebook) < error(round_to_integers(codebook)) < 1.005 * error(codebook)
