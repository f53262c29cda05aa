"""Static scales and SmoothQuant against what transformers' own modules see."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from anequant.calibration.activation_scales import find_largest_magnitudes, smooth_scale
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import Source
from anequant.pipeline.quantize import quantize
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe
from anequant.request import Request

STATIC = {"bits": 16, "activation_bits": 8, "activation_scales": "static"}
WINDOWS, LENGTH = 6, 24


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(97, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(5))


def written(folder: Path, model: Path, tokens: Tensor, **overrides: Any) -> Path:
    (folder / "calib.json").write_text(json.dumps(tokens.tolist()))
    recipe = load_recipe("w8-nearest", {"r1": "none", "r2": "none", **STATIC, **overrides})
    calibration = Calibration((str(folder / "calib.json"),), WINDOWS, LENGTH)
    quantize(Request(Source(model, "model"), recipe, calibration), folder / "written")
    return folder / "written"


def inputs_of(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """The input [n, length, in] of every projection of stock transformers, with the folder's weights."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    plain = folder.parent / "plain"
    plain.mkdir(exist_ok=True)
    (plain / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "anequant.safetensors", plain / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda _, arguments, name=name: seen.__setitem__(name, arguments[0].detach())
            )
    with torch.no_grad():
        model(tokens)
    return seen


def test_absmax_scales_are_those_of_the_calibration_tokens(
    tmp_path: Path, tokens: Tensor, make_model: Callable[..., Path]
) -> None:
    model = make_model(tmp_path / "model", "qwen2", False)
    folder = written(tmp_path, model, tokens, activation_prefix=2)
    online = open_checkpoint(folder).online
    seen = inputs_of(folder, tokens)
    assert seen.keys() == online.activations.keys()
    for name, x in seen.items():
        expected = float((x[:, 2:].abs().max() / 127).half())
        assert online.activations[name].scale == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("kind", ["percentile", "mse"])
def test_a_narrower_range_is_chosen_where_it_pays(
    tmp_path: Path, tokens: Tensor, make_model: Callable[..., Path], kind: str
) -> None:
    model = make_model(tmp_path / "model", "llama", False)
    (tmp_path / "absmax").mkdir()
    widest = open_checkpoint(written(tmp_path / "absmax", model, tokens)).online.activations
    folder = written(tmp_path, model, tokens, activation_range=kind)
    chosen, seen = open_checkpoint(folder).online.activations, inputs_of(folder, tokens)

    def error(x: Tensor, scale: float) -> float:
        return float(((x / scale).round().clamp(-128, 127) * scale - x).square().mean())

    for name, x in seen.items():
        ours, absmax = chosen[name].scale, widest[name].scale
        assert ours is not None and absmax is not None and ours <= absmax
        if kind == "mse":
            assert error(x, ours) <= error(x, absmax) * 1.01
        else:
            assert float((x.abs() > 127.5 * ours).double().mean()) < 1e-3


def test_smoothing_moves_a_channel_between_activations_and_weights(
    tmp_path: Path, tokens: Tensor, make_model: Callable[..., Path]
) -> None:
    """down's input scale makes its channels alike, and the model computes what it did."""
    model = make_model(tmp_path / "model", "qwen2", False)
    folder = written(tmp_path, model, tokens, smooth=1.0, activation_overrides="q_proj=16")
    tensors = load_file(folder / "anequant.safetensors")
    seen = inputs_of(folder, tokens)
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.down_proj"
        scale = tensors[f"{name}.input_scales"]
        channels = seen[name].abs().amax((0, 1)) * scale[0]
        assert float(channels.max() / channels.min()) < 1.01
        static = open_checkpoint(folder).online.activations[name].scale
        assert static == pytest.approx(float(channels.max() / 127), rel=2e-3)


def test_smoothed_scale_is_smoothquants_with_the_weights_balance() -> None:
    generator = torch.Generator().manual_seed(0)
    balanced = torch.rand(64, generator=generator) + 0.5
    magnitudes = torch.rand(64, generator=generator) * 10 + 0.1
    result = smooth_scale(balanced, magnitudes, 0.5)
    expected = (balanced.double() / magnitudes.double()).sqrt()
    expected /= expected.log().mean().exp()
    assert torch.allclose(result.double(), expected, rtol=1e-3)
    assert torch.equal(result, result.half().float())
    assert torch.allclose(
        smooth_scale(balanced, magnitudes, 0.0), balanced / balanced.log().mean().exp(), rtol=1e-3
    )


def test_largest_magnitudes_leave_the_prefix_out() -> None:
    parts = [torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    parts[1][0, 0] = 1e4
    expected = torch.cat(parts)[:, 1:].abs().amax((0, 1))
    assert torch.equal(find_largest_magnitudes(parts, 1), expected)
