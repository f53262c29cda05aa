"""config.json of a quantized checkpoint, read as each generation of transformers reads it.

transformers 4 reads rope_theta, rope_scaling and torch_dtype at the top level; transformers 5 reads
rope_parameters and dtype. What only one generation reads must say what the other's keys say.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from anequant.architectures import read_spec
from anequant.checkpoints.online_config import build_plain_config

THETA = 500000.0
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
COMMON: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "custom_key": {"kept": [1, 2]},
}


def source_config(rope: str, generation: str) -> dict[str, Any]:
    if generation == "five":
        return {**COMMON, "dtype": "bfloat16", "rope_parameters": {**ROPES[rope], "rope_theta": THETA}}
    scaling = None if rope == "default" else dict(ROPES[rope])
    if generation == "old four" and scaling is not None:
        scaling["type"] = scaling.pop("rope_type")
    return {**COMMON, "torch_dtype": "bfloat16", "rope_theta": THETA, "rope_scaling": scaling}


def written_config(source: dict[str, Any]) -> dict[str, Any]:
    """config.json of what is made from a model with this one."""
    return build_plain_config(read_spec(source, "config.json").config)


def rotary_tables(config: dict[str, Any]) -> torch.Tensor:
    values = {key: value for key, value in config.items() if key != "model_type"}
    rotary = LlamaRotaryEmbedding(AutoConfig.for_model("llama", **values))
    return torch.stack(rotary(torch.empty(1), torch.arange(256)[None]))


each_rope = pytest.mark.parametrize("rope", ROPES)
each_generation = pytest.mark.parametrize("generation", ["five", "four", "old four"])


@each_rope
@each_generation
def test_both_generations_find_their_keys(rope: str, generation: str) -> None:
    config = written_config(source_config(rope, generation))
    assert config["rope_parameters"] == {**ROPES[rope], "rope_theta": THETA}
    assert config["rope_theta"] == THETA
    assert config["rope_scaling"] == (None if rope == "default" else ROPES[rope])
    assert config["dtype"] == config["torch_dtype"] == "float16"


@each_rope
@each_generation
def test_each_generations_keys_alone_give_the_sources_rope(rope: str, generation: str) -> None:
    source = source_config(rope, generation)
    expected = rotary_tables(source)
    config = written_config(source)
    assert torch.equal(rotary_tables(config), expected)
    as_five = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    assert torch.equal(rotary_tables(as_five), expected)
    as_four = {key: value for key, value in config.items() if key != "rope_parameters"}
    assert torch.equal(rotary_tables(as_four), expected)


def test_the_ropes_above_differ() -> None:
    tables = [rotary_tables(source_config(rope, "five")) for rope in ROPES]
    for i, first in enumerate(tables):
        assert all(float((first - other).abs().max()) > 0.1 for other in tables[i + 1 :])


@each_generation
def test_the_rest_is_kept_and_the_head_untied(generation: str) -> None:
    source = source_config("default", generation)
    source |= {"quantization_config": {"quant_method": "anequant"}, "auto_map": {"AutoModel": "evil.Model"}}
    before = {**source}
    config = written_config(source)
    assert source == before
    assert config["tie_word_embeddings"] is False
    assert "quantization_config" not in config and "auto_map" not in config
    for key in COMMON.keys() - {"tie_word_embeddings"}:
        assert config[key] == COMMON[key]


@each_rope
def test_a_plain_config_of_a_plain_config_is_the_same(rope: str) -> None:
    config = written_config(source_config(rope, "four"))
    assert written_config(config) == config


def test_no_rope_settings_at_all_mean_llamas_defaults() -> None:
    written = written_config(COMMON)
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert torch.equal(rotary_tables(written_config(COMMON)), rotary_tables(COMMON))
