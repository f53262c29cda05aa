"""Indexes, configs and values that contradict the table or each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import Damage, assert_refused, parts, raw, write
from files import edit_json

from anequant.errors import InputError, UnsupportedError

pytestmark = pytest.mark.usefixtures("warm")

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BAD, UNSUPPORTED = InputError.exit_code, UnsupportedError.exit_code


def index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(model: Path) -> None:
        values = json.loads((model / INDEX).read_text())
        change(values)
        (model / INDEX).write_text(json.dumps(values))

    return damage


def shard(name: Any) -> Damage:
    """The norm lies in a shard of this name."""
    return index(lambda values: values["weight_map"].update({"model.norm.weight": name}))


def index_text(text: str) -> Damage:
    return lambda model: (model / INDEX).write_text(text)


def config(**changes: Any) -> Damage:
    return lambda model: edit_json(model / "config.json", **changes)


def layers(count: int) -> Damage:
    """Another number of layers, all of the same type."""
    return config(num_hidden_layers=count, layer_types=None)


def without(key: str) -> Damage:
    def damage(model: Path) -> None:
        values = json.loads((model / "config.json").read_text())
        del values[key]
        (model / "config.json").write_text(json.dumps(values))

    return damage


def config_text(text: str) -> Damage:
    return lambda model: (model / "config.json").write_text(text)


def in_both(model: Path) -> None:
    entries, data = parts(model / SECOND)
    others, other_data = parts(model / FIRST)
    name = next(iter(others))
    begin, end = others[name]["data_offsets"]
    entries[name] = {**others[name], "data_offsets": [len(data), len(data) + end - begin]}
    write(model / SECOND, entries, data + other_data[begin:end])


def renamed(old: str, new: str) -> Damage:
    def damage(model: Path) -> None:
        header, data = parts(model / "model.safetensors")
        header[new] = header.pop(old)
        raw(model / "model.safetensors", json.dumps(header).encode(), data)

    return damage


def value(name: str, place: int, number: float) -> Damage:
    def damage(model: Path) -> None:
        header, data = parts(model / "model.safetensors")
        begin, end = header[name]["data_offsets"]
        values = np.frombuffer(data[begin:end], np.float32).copy()
        values[place] = number
        changed = data[:begin] + values.tobytes() + data[end:]
        raw(model / "model.safetensors", json.dumps(header).encode(), changed)

    return damage


INDEXES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no weight_map": (index(lambda values: values.pop("weight_map")), ("no weight_map",)),
    "weight_map a list": (index(lambda values: values.update(weight_map=[1])), ("no weight_map",)),
    "a number as shard": (shard(3), ("no weight_map of names",)),
    "parent folder": (shard("../model.safetensors"), ("leaves the model folder",)),
    "absolute": (shard("/etc/passwd.safetensors"), ("leaves the model folder",)),
    "drive": (shard("C:x.safetensors"), ("leaves the model folder",)),
    "unc": (shard("\\\\host\\share\\x.safetensors"), ("leaves the model folder",)),
    "backslashes": (shard("a\\..\\b.safetensors"), ("leaves the model folder",)),
    "sub-folder": (shard("sub/x.safetensors"), ("leaves the model folder",)),
    "empty": (shard(""), ("leaves the model folder",)),
    "pickle": (shard("pytorch_model.bin"), ("is no safetensors file",)),
    "escape": (shard("\x1b[2J.safetensors"), (r"\x1b[2J",)),
    "missing shard": (shard("model-00003-of-00002.safetensors"), ("'model-00003-of-00002", "is missing")),
    "wrong shard": (shard(SECOND), ("'model.norm.weight' is not in", SECOND)),
    "a tensor nobody has": (
        index(lambda values: values["weight_map"].update(ghost=FIRST)),
        ("'ghost' is not in",),
    ),
    "a tensor in two shards": (in_both, ("is in",)),
    "not json": (index_text("{"), (INDEX, "cannot be read")),
    "a list": (index_text("[]"), ("no weight_map",)),
    "deep": (index_text("[" * 100_000), ("cannot be read",)),
    "twice": (index_text('{"weight_map": {}, "weight_map": {}}'), ("appears twice",)),
    "huge": (index_text('{"weight_map": {}}' + " " * 17_000_000), ("more than 16000000 bytes",)),
}

CONFIGS: dict[str, tuple[Damage, int, tuple[str, ...]]] = {
    "not json": (config_text("{"), BAD, ("'config.json' cannot be read",)),
    "empty": (config_text(""), BAD, ("'config.json' cannot be read",)),
    "a list": (config_text("[]"), BAD, ("holds no object",)),
    "deep": (config_text('{"a":' * 100_000), BAD, ("cannot be read",)),
    "nan": (config_text('{"rms_norm_eps": NaN}'), BAD, ("NaN is not JSON",)),
    "twice": (config_text('{"model_type": "llama", "model_type": "qwen2"}'), BAD, ("appears twice",)),
    "no model_type": (without("model_type"), UNSUPPORTED, ("unknown architecture", "llama")),
    "unknown model_type": (config(model_type="gpt2"), UNSUPPORTED, ("unknown architecture", "'gpt2'")),
    "wrong case": (config(model_type="Qwen2"), UNSUPPORTED, ("unknown architecture",)),
    "model_type a list": (config(model_type=["qwen2"]), UNSUPPORTED, ("unknown architecture",)),
    "escape": (config(model_type="\x1b[2J"), UNSUPPORTED, (r"\x1b[2J",)),
    "width 0": (config(hidden_size=0), BAD, ("'hidden_size' is 0",)),
    "width -64": (config(hidden_size=-64), BAD, ("'hidden_size' is -64",)),
    "width 64.0": (config(hidden_size=64.0), BAD, ("'hidden_size' is 64.0",)),
    "width a word": (config(hidden_size="64"), BAD, ("'hidden_size' is '64'",)),
    "width true": (config(hidden_size=True), BAD, ("'hidden_size' is True",)),
    "width 2**63": (config(hidden_size=2**63), BAD, ("'hidden_size' is 9223372036854775808",)),
    "no width": (without("hidden_size"), BAD, ("[97, 4096]", "check vocab_size, hidden_size")),
    "other width": (config(hidden_size=128), BAD, ("has shape",)),
    "odd heads": (config(num_attention_heads=5), BAD, ("num_attention_heads 5",)),
    "kv heads": (config(num_key_value_heads=3), BAD, ("num_key_value_heads 3 does not divide",)),
    "odd head size": (config(head_dim=15), BAD, ("`head_dim`=15",)),
    "too many layers": (layers(3), BAD, ("'model.layers.2.", "is missing")),
    "too few layers": (layers(1), BAD, ("'model.layers.1.", "beyond the 1 layers")),
    "layers and their types": (config(num_hidden_layers=3), BAD, ("`num_hidden_layers` (3)", "layer_types")),
    "10**9 layers": (config(num_hidden_layers=10**9), BAD, ("'num_hidden_layers' is 1000000000",)),
    "vocabulary": (config(vocab_size=98), BAD, ("[97, 64]", "[98, 64]")),
    "activation": (config(hidden_act="gelu"), UNSUPPORTED, ("'hidden_act' is 'gelu'",)),
    "eps 0": (config(rms_norm_eps="0"), BAD, ("'rms_norm_eps'",)),
    "eps 3": (config(rms_norm_eps=3.0), BAD, ("'rms_norm_eps'",)),
    "quantized": (config(quantization_config={"quant_method": "awq"}), BAD, ("already quantized", "awq")),
    "quantized, a list": (config(quantization_config=[]), BAD, ("already quantized", "unknown")),
    "tie a word": (config(tie_word_embeddings="no"), BAD, ("tie_word_embeddings",)),
}

VALUES: dict[str, tuple[Damage, int, tuple[str, ...]]] = {
    "untied, without a head": (
        renamed("lm_head.weight", "other.weight"),
        BAD,
        ("tensor 'lm_head.weight' is missing",),
    ),
    "a bias that is missing": (
        renamed("model.layers.0.self_attn.q_proj.bias", "b"),
        BAD,
        ("'model.layers.0.self_attn.q_proj.bias' is missing",),
    ),
    "nan": (
        value("model.layers.1.mlp.up_proj.weight", 70, float("nan")),
        BAD,
        ("model.layers.1.mlp.up_proj.weight", "1 values", "[1, 6]"),
    ),
    "infinity": (value("model.norm.weight", 3, float("inf")), BAD, ("model.norm.weight", "[3]")),
    "nan in the embedding": (
        value("model.embed_tokens.weight", 5, float("nan")),
        BAD,
        ("model.embed_tokens.weight", "[0, 5]"),
    ),
    "too large for float16": (
        value("model.layers.0.mlp.down_proj.weight", 0, 1e9),
        UNSUPPORTED,
        ("model.layers.0.mlp.down_proj", "float16"),
    ),
}


IN_WEIGHTS = ("nan", "infinity", "nan in the embedding", "too large for float16")
"""What only the numbers themselves tell, which no plan reads."""


@pytest.mark.parametrize("case", INDEXES)
def test_a_lying_index_is_refused(in_two: Path, case: str) -> None:
    damage, words = INDEXES[case]
    damage(in_two)
    assert_refused(in_two.parent, ["quantize", in_two, "-o", in_two.parent / "out"], BAD, *words)


@pytest.mark.parametrize("case", CONFIGS)
def test_an_impossible_config_is_refused(model: Path, case: str) -> None:
    damage, code, words = CONFIGS[case]
    damage(model)
    assert_refused(model.parent, ["quantize", model, "-o", model.parent / "out"], code, *words)


@pytest.mark.parametrize("case", VALUES)
def test_impossible_tensors_are_refused(model: Path, case: str) -> None:
    damage, code, words = VALUES[case]
    damage(model)
    arguments = ["quantize", model, "-o", model.parent / "out", "--recipe", "w4-nearest"]
    assert_refused(model.parent, arguments, code, *words, planned=case not in IN_WEIGHTS)
