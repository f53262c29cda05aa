"""config.json in every spelling: what is written is, to stock transformers, the model that the source is.

A variation changes the config.json of a small model. Either `rotate` writes a folder whose logits, by stock
transformers, are those of the source by stock transformers, or it refuses and names the key (or the tensor
that contradicts it). What is refused is listed, so that nothing else is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from anequant.checkpoints.source import Source
from anequant.errors import AnequantError
from anequant.pipeline.rotate import rotate
from anequant.recipe_files import load_recipe
from anequant.request import Request

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WINDOWED = ("mistral", "qwen2", "qwen3")
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
LENGTH = 40
GONE = object()
"""The value of a key that is left out."""

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NO_ROPE = {"rope_parameters": GONE, "rope_theta": GONE, "rope_scaling": GONE}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}

VARIATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no rope at all": NO_ROPE,
    "only an old theta": {**NO_ROPE, "rope_theta": 700.0},
    "an old theta that is an int": {**NO_ROPE, "rope_theta": 700},
    "old scaling": {**NO_ROPE, "rope_theta": 700.0, "rope_scaling": {"rope_type": "yarn", **YARN}},
    "old scaling by type": {**NO_ROPE, "rope_theta": 700.0, "rope_scaling": {"type": "yarn", **YARN}},
    "old llama3 scaling": {**NO_ROPE, "rope_theta": 7e2, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "type and rope_type disagree": {
        **NO_ROPE,
        "rope_scaling": {"type": "linear", "rope_type": "yarn", **YARN},
    },
    "only type in rope_parameters": {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 7e2}},
    "both thetas, the same": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e2},
        "rope_theta": 7e2,
    },
    "both thetas, not the same": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        "rope_theta": 90.0,
    },
    "a theta beside rope_parameters that have none": {
        "rope_parameters": {"rope_type": "default"},
        "rope_theta": 90.0,
    },
    "rope_scaling over default rope_parameters": {"rope_scaling": {"rope_type": "yarn", **YARN}},
    "rope_scaling over other rope_parameters": {
        "rope_parameters": LINEAR,
        "rope_scaling": {"type": "yarn", **YARN},
    },
    "rope_scaling null": {"rope_parameters": LINEAR, "rope_scaling": None},
    "rope_scaling empty": {"rope_parameters": LINEAR, "rope_scaling": {}},
    "rope_parameters null": {"rope_parameters": None, "rope_scaling": LINEAR},
    "rope_parameters empty": {"rope_parameters": {}},
    "rope_theta null": {"rope_theta": None},
    "an int as factor": {"rope_parameters": {**LINEAR, "factor": 2}},
    "an int as theta": {"rope_parameters": {**LINEAR, "rope_theta": 500}},
    "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}},
    "yarn without its original length": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e2}
    },
    "the original length outside": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0},
        "original_max_position_embeddings": 32,
    },
    "a whole rotary factor": {"partial_rotary_factor": 1.0},
    "half a rotary factor": {"partial_rotary_factor": 0.5},
    "head_dim left out": {"head_dim": GONE},
    "head_dim null": {"head_dim": None},
    "key-value heads left out": {"num_key_value_heads": GONE},
    "key-value heads null": {"num_key_value_heads": None},
    "width left out": {"hidden_size": GONE},
    "eps left out": {"rms_norm_eps": GONE},
    "another eps": {"rms_norm_eps": 0.01},
    "an int as eps": {"rms_norm_eps": 0},
    "eps null": {"rms_norm_eps": None},
    "activation left out": {"hidden_act": GONE},
    "activation null": {"hidden_act": None},
    "activation by another name": {"hidden_act": "swish"},
    "tie left out": {"tie_word_embeddings": GONE},
    "tie null": {"tie_word_embeddings": None},
    "tied, and a head of its own": {"tie_word_embeddings": True},
    "tie an int": {"tie_word_embeddings": 1},
    "attention bias left out": {"attention_bias": GONE},
    "no attention bias, but stored ones": {"attention_bias": False},
    "attention bias an int": {"attention_bias": 1},
    "no mlp bias, but stored ones": {"mlp_bias": False},
    "a window that is wide enough": {"sliding_window": 4096},
    "a window that nobody asked for": {"sliding_window": 8},
    "a window that is asked for": {
        "sliding_window": 4096,
        "use_sliding_window": True,
        "max_window_layers": 0,
    },
    "a narrow window that is asked for": {
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": GONE,
    },
    "a window of null": {"sliding_window": None},
    "window left out": {"sliding_window": GONE},
    "types of layers left out": {"layer_types": GONE},
    "types of layers null": {"layer_types": None},
    "types of layers without a window": {"layer_types": ["full_attention", "sliding_attention"]},
    "types of layers with a narrow window": {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 8,
        "use_sliding_window": True,
    },
    "positions left out": {"max_position_embeddings": GONE},
    "positions null": {"max_position_embeddings": None},
    "no dtype": {"dtype": GONE, "torch_dtype": GONE},
    "both dtypes": {"dtype": "float32", "torch_dtype": "bfloat16"},
    "an old dtype": {"dtype": GONE, "torch_dtype": "float32"},
    "dtypes null": {"dtype": None, "torch_dtype": None},
    "an unused scale of queries": {"query_pre_attn_scalar": 224},
    "unused soft caps": {"final_logit_softcapping": 30.0},
    "unused soft caps of null": {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    "unused multipliers": {"embedding_multiplier": 12.0},
    "unused experts": {"num_local_experts": 8},
    "no experts": {"num_local_experts": 0},
    "layers without rope": {"no_rope_layers": [0, 1]},
    "keys of GPT-2": {"n_embd": 768, "n_layer": 12, "activation_function": "gelu_new"},
    "tensor parallel pretraining": {"pretraining_tp": 2},
    "dropout": {"attention_dropout": 0.5},
    "an int as dropout": {"attention_dropout": 0},
    "tokens null": {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    "ends in a list": {"eos_token_id": [2, 3]},
    "a padding token": {"pad_token_id": 0},
    "another class": {"architectures": ["GPT2LMHeadModel"]},
    "no class": {"architectures": None},
    "no version": {"transformers_version": GONE},
    "no cache": {"use_cache": False},
    "no quantization": {"quantization_config": None},
    "where it came from": {"_name_or_path": "org/model", "name_or_path": "org/model"},
    "attention that looks ahead": {"is_causal": False},
    "attention that looks back": {"is_causal": True},
    "a dtype that is none": {"dtype": "auto", "torch_dtype": "garbage"},
    "another attention": {"_attn_implementation": "eager"},
    "other weights by name": {"transformers_weights": "other.safetensors"},
}
NAMED: dict[str, tuple[str, ...]] = {
    "rope_theta null": ("rope_theta",),
    "half a rotary factor": ("partial_rotary_factor",),
    "head_dim left out": ("head_dim",),
    "head_dim null": ("head_dim",),
    "key-value heads left out": ("num_key_value_heads",),
    "key-value heads null": ("num_key_value_heads",),
    "width left out": ("hidden_size",),
    "eps null": ("rms_norm_eps",),
    "an int as eps": ("rms_norm_eps",),
    "activation null": ("hidden_act",),
    "activation by another name": ("hidden_act",),
    "tie null": ("tie_word_embeddings",),
    "tie an int": ("tie_word_embeddings",),
    "attention bias an int": ("attention_bias",),
    "a window that nobody asked for": ("sliding_window",),
    "a narrow window that is asked for": ("sliding_window",),
    "types of layers null": ("sliding_window",),
    "types of layers without a window": ("sliding_window",),
    "types of layers with a narrow window": ("sliding_window", "model_type"),
    "positions null": ("max_position_embeddings",),
    "an unused scale of queries": ("query_pre_attn_scalar",),
    "unused soft caps": ("final_logit_softcapping",),
    "unused multipliers": ("embedding_multiplier",),
    "unused experts": ("num_local_experts",),
    "attention that looks ahead": ("is_causal",),
    "other weights by name": ("transformers_weights",),
}
"""What may be refused, and a word of which the refusal must have one."""


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {family: make_model(place / family, family, False, **SMALL) for family in FAMILIES}


def varied(model: Path, place: Path, changes: dict[str, Any]) -> Path:
    """A folder with the model's weights and its config.json with these changes."""
    place.mkdir()
    os.link(model / "model.safetensors", place / "model.safetensors")
    config = {**json.loads((model / "config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not GONE}
    (place / "config.json").write_text(json.dumps(kept))
    return place


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(97, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    result: Tensor = model(input_ids=tokens, use_cache=False).logits.double()
    return result


def cases() -> Iterator[Any]:
    for family in FAMILIES:
        for name in VARIATIONS:
            yield pytest.param(family, name, id=f"{family}: {name}")


@pytest.mark.parametrize(("family", "name"), cases())
def test_a_variation_is_the_same_model_or_refused_by_name(
    models: dict[str, Path], tmp_path: Path, family: str, name: str
) -> None:
    source = varied(models[family], tmp_path / "source", VARIATIONS[name])
    try:
        rotate(Request(Source(source, "source"), load_recipe("w4-nearest", {})), tmp_path / "out")
    except AnequantError as error:
        assert any(word in str(error) for word in NAMED.get(name, ())), f"{error!r}"
        assert not (tmp_path / "out").exists()
        return
    expected = logits(source)
    assert float((logits(tmp_path / "out") - expected).abs().max() / expected.abs().max()) < 1e-5
