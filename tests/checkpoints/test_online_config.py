"""quantization_config: what is written is read back, and what is not ours or broken is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Quantized

from anequant.checkpoints.online_config import build_config, choose_stem, read_online
from anequant.checkpoints.reader import open_checkpoint
from anequant.errors import InputError
from anequant.quantization.online import Online, plan_online
from anequant.recipe import Recipe
from anequant.recipe_files import load_recipe

STATIC = {"activation_bits": 8, "activation_scales": "static", "activation_overrides": "down_proj=16"}
CHOICES: dict[str, dict[str, Any]] = {
    "r3": {"r3": "hadamard"},
    "r4": {"r4": "block-hadamard", "r4_block": 32},
    "dynamic": {"activation_bits": 4, "activation_symmetric": False, "activation_clip": 0.95},
    "static": {**STATIC, "activation_prefix": 1},
    "kv": {"kv_bits": 4},
    "all": {**STATIC, "r3": "hadamard", "r4": "hadamard", "kv_bits": 8},
}


def scaled(recipe: Recipe, model: Path) -> Online:
    online = plan_online(open_checkpoint(model).spec, recipe)
    if not recipe.static_activations:
        return online
    return online.with_scales({name: 0.5 + 2.0**-9 * k for k, name in enumerate(online.activations)})


def config_of(recipe: Recipe, online: Online, model: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(
        json.dumps(build_config(open_checkpoint(model).spec, recipe, online, "anequant.safetensors"))
    )
    return values


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_written_is_read_back(tiny_qwen2: Path, choice: str) -> None:
    recipe = load_recipe("w4-nearest", CHOICES[choice])
    online = scaled(recipe, tiny_qwen2)
    config = config_of(recipe, online, tiny_qwen2)
    read = read_online(config, open_checkpoint(tiny_qwen2).spec, "config.json")
    assert (read.activations, read.prefix, read.kv_bits) == (
        online.activations,
        online.prefix,
        online.kv_bits,
    )
    for ours, theirs in ((read.r3, online.r3), (read.r4, online.r4)):
        assert (ours is None) == (theirs is None) and (ours is None or ours.size == theirs.size)  # type: ignore[union-attr]
    assert choose_stem(online) == "anequant" and config["quantization_config"]["quant_method"] == "anequant"


def test_weights_alone_need_no_quantization_config(tiny_qwen2: Path) -> None:
    recipe = load_recipe("w4-nearest")
    online = scaled(recipe, tiny_qwen2)
    assert "quantization_config" not in config_of(recipe, online, tiny_qwen2)
    assert choose_stem(online) == "model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "already quantized .*gptq"),
        ({"format": 2}, "not one that this version reads"),
        ({"static_scales": None}, "not one that this version reads"),
        ({"static_scales": {}}, "no static scale for 'model.layers.0"),
        ({"kv_bits": 5}, "quantization_config: recipe key 'kv_bits' cannot be 5"),
        ({"activation_bits": "8"}, "must be a whole number"),
        ({"activation_overrides": "nose=8"}, "names 'nose'"),
    ],
)
def test_a_broken_one_is_refused(tiny_qwen2: Path, change: dict[str, Any], message: str) -> None:
    recipe = load_recipe("w4-nearest", CHOICES["all"])
    config = config_of(recipe, scaled(recipe, tiny_qwen2), tiny_qwen2)
    config["quantization_config"] |= change
    with pytest.raises(InputError, match=message):
        read_online(config, open_checkpoint(tiny_qwen2).spec, "model/config.json")


def test_a_static_scale_must_be_a_positive_number(tiny_qwen2: Path) -> None:
    recipe = load_recipe("w4-nearest", CHOICES["all"])
    config = config_of(recipe, scaled(recipe, tiny_qwen2), tiny_qwen2)
    scales = config["quantization_config"]["static_scales"]
    for value in (0.0, -1.0, float("inf"), "1", None):
        scales[next(iter(scales))] = value
        with pytest.raises(InputError, match="no static scale"):
            read_online(config, open_checkpoint(tiny_qwen2).spec, "config.json")


def test_the_files_of_such_a_checkpoint_have_names_of_their_own(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized]
) -> None:
    folder = quantize_model(tiny_qwen2, "w4-nearest", **CHOICES["all"]).folder
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["anequant.safetensors"]
    checkpoint = open_checkpoint(folder)
    assert checkpoint.files == ["config.json", "anequant.safetensors"]
    scales = [format_.scale for format_ in checkpoint.online.activations.values()]
    assert len(scales) == 6 * checkpoint.spec.num_layers and all(scales)
