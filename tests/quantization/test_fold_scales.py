"""fold_input_scales must leave a layer's function alone; transformers' own layers are the judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anequant.checkpoints.reader import open_checkpoint
from anequant.quantization.fold_scales import fold_input_scales
from anequant.quantization.scales import output_scale
from anequant.reference.forward import ReferenceModel

LAYER = 1


@pytest.fixture(params=["llama", "qwen2", "qwen3", "mistral"])
def layer(
    request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path: Path
) -> tuple[ReferenceModel, dict[str, Tensor], dict[str, Tensor]]:
    """A float64 layer whose inputs have unequal sizes, before and after."""
    checkpoint = open_checkpoint(make_model(tmp_path / "model", request.param, False))
    tensors = {name: value.double() for name, value in checkpoint.layer(LAYER).items()}
    generator = torch.Generator().manual_seed(4)
    for name, value in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = value * (4 * torch.rand(value.shape[1], generator=generator).double()).exp2()
    assert any(name.endswith("_proj.bias") for name in tensors) or request.param == "mistral"
    model = ReferenceModel(checkpoint.spec, torch.float64)
    return model, tensors, fold_input_scales(checkpoint.spec, tensors)


def test_the_layer_computes_what_it_did(
    layer: tuple[ReferenceModel, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    model, before, after = layer
    hidden = torch.randn(2, 11, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = model.run_layer(LAYER, before, hidden)
    assert before.keys() == after.keys()
    torch.testing.assert_close(model.run_layer(LAYER, after, hidden), expected, rtol=1e-10, atol=1e-10)


def column_spread(*weights: Tensor) -> float:
    """Standard deviation of the log sizes of columns, rows first brought to one size."""
    whole = torch.cat(weights)
    sizes = (whole / output_scale(whole, "rms")[:, None]).square().mean(0).sqrt()
    return float(sizes.log().std())


GROUPS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@pytest.mark.parametrize("group", GROUPS.values(), ids=list(GROUPS))
def test_columns_become_equal(
    layer: tuple[ReferenceModel, dict[str, Tensor], dict[str, Tensor]], group: tuple[str, ...]
) -> None:
    """The two query heads of a value head share its scale, so o's columns are equal two by two together."""

    def columns(tensors: dict[str, Tensor]) -> list[Tensor]:
        weights = [tensors[f"{name}.weight"] for name in group]
        if group == GROUPS["o"]:
            heads = weights[0].unflatten(1, (2, 2, -1))
            return [heads[:, :, reader].flatten(1) for reader in range(2)]
        return weights

    _, before, after = layer
    assert column_spread(*columns(before)) > 0.3
    assert column_spread(*columns(after)) < 0.05


def test_the_scale_moved_to_where_it_is_free(
    layer: tuple[ReferenceModel, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    _, before, after = layer
    gains = {}
    for norm, reader in (
        ("input_layernorm", "self_attn.q_proj"),
        ("post_attention_layernorm", "mlp.gate_proj"),
    ):
        scale = gains[norm] = after[f"{norm}.weight"] / before[f"{norm}.weight"]
        assert float((scale.half() - scale).abs().max()) < 1e-12
        torch.testing.assert_close(after[f"{reader}.weight"] * scale, before[f"{reader}.weight"])
    for source, norm, reader, repeats in (
        ("mlp.up_proj", "post_attention_layernorm", "mlp.down_proj", 1),
        ("self_attn.v_proj", "input_layernorm", "self_attn.o_proj", 2),
    ):
        ratio = after[f"{source}.weight"] * gains[norm] / before[f"{source}.weight"]
        scale = ratio.mean(1)
        torch.testing.assert_close(ratio, scale[:, None].expand_as(ratio))
        assert float((scale.half() - scale).abs().max()) < 1e-12
        if f"{source}.bias" in before:
            torch.testing.assert_close(after[f"{source}.bias"], before[f"{source}.bias"] * scale)
        heads = 1 if repeats == 1 else 2
        read = scale.view(heads, 1, -1).expand(heads, repeats, -1).reshape(-1)
        torch.testing.assert_close(after[f"{reader}.weight"] * read, before[f"{reader}.weight"])


def test_nothing_else_moved(layer: tuple[ReferenceModel, dict[str, Tensor], dict[str, Tensor]]) -> None:
    _, before, after = layer
    same = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    same += [f"self_attn.{name}_proj.bias" for name in "qko"] + ["mlp.gate_proj.bias", "mlp.down_proj.bias"]
    for name in same:
        if name in before:
            assert torch.equal(before[name], after[name]), name
