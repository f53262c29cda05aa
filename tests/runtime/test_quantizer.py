"""Checkpoints that are more than their weights, in transformers: with `import anequant`, and without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quantized
from running import execute_python
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import anequant
from anequant.checkpoints import writer
from anequant.checkpoints.reader import open_checkpoint
from anequant.errors import InputError, UsageError
from anequant.reference.forward import logits

STATIC = {"activation_bits": 8, "activation_scales": "static", "activation_overrides": "down_proj=16"}
CHOICES: dict[str, dict[str, Any]] = {
    "rotations": {"r3": "hadamard", "r4": "hadamard"},
    "static": {**STATIC, "activation_prefix": 2},
    "smooth": {"bits": 16, "smooth": 0.5, "activation_bits": 8, "activation_scales": "static"},
    "dynamic": {"activation_bits": 4, "activation_symmetric": False, "r4": "block-hadamard", "r4_block": 32},
    "all": {**STATIC, "activation_prefix": 1, "r3": "hadamard", "r4": "hadamard", "kv_bits": 4},
}


@pytest.fixture(params=CHOICES)
def folder(
    request: pytest.FixtureRequest, tiny_qwen2: Path, quantize_model: Callable[..., Quantized]
) -> Path:
    made: Path = quantize_model(tiny_qwen2, "w4-nearest", **CHOICES[request.param]).folder
    return made


@pytest.fixture
def everything(tiny_qwen2: Path, quantize_model: Callable[..., Quantized]) -> Path:
    made: Path = quantize_model(tiny_qwen2, "w4-nearest", **CHOICES["all"]).folder
    return made


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 1000, (2, 40), generator=torch.Generator().manual_seed(3))


def run(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens, **options).logits
    return result


def test_from_pretrained_load_and_the_pipeline_agree(folder: Path, tokens: Tensor) -> None:
    opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    theirs = run(opened, tokens)
    assert torch.equal(theirs, run(anequant.load(folder, dtype=torch.float64), tokens))
    ours = torch.stack(list(logits(open_checkpoint(folder), tokens, torch.float64)))
    torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-10)


def test_token_by_token_is_the_whole_sequence(folder: Path, tokens: Tensor) -> None:
    model = anequant.load(folder, dtype=torch.float64)
    whole, cache, parts = run(model, tokens), None, []
    for part in torch.split(tokens, [7, 1, 1, 30, 1], 1):
        with torch.no_grad():
            output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


def test_without_what_runs_the_logits_are_others(everything: Path, tokens: Tensor, tmp_path: Path) -> None:
    """The quantizer is what makes the model: the same weights in stock transformers are not it."""
    shutil.copytree(everything, tmp_path / "stock")
    (tmp_path / "stock" / "anequant.safetensors").rename(tmp_path / "stock" / "model.safetensors")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "stock" / "config.json").write_text(json.dumps(config))
    stock = run(AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float64), tokens)
    ours = run(anequant.load(everything, dtype=torch.float64), tokens)
    assert (stock - ours).norm() > 0.5 * ours.norm()


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except OSError as error:
    print("refused:", error)
import anequant
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64)
    print(model(torch.arange(9)[None]).logits.double().sum().item())
"""


def test_without_the_import_transformers_finds_no_weights(everything: Path) -> None:
    """And with it, after transformers is imported, it does."""
    done = execute_python(SCRIPT, everything)
    assert done.exit_code == 0, done.stderr
    refused, total = done.stdout.splitlines()
    assert refused.startswith("refused: ") and "no file named model.safetensors" in refused
    ours = run(anequant.load(everything, dtype=torch.float64), torch.arange(9)[None])
    assert float(total) == pytest.approx(float(ours.sum()), rel=1e-9)


def test_shards(tiny_qwen2: Path, everything: Path, tokens: Tensor, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(everything)
    entries = [
        writer.Entry(name, checkpoint.read(name).dtype, info.shape)
        for name, info in checkpoint.tensors.items()
    ]
    sharded = tmp_path / "sharded"
    shutil.copytree(everything, sharded)
    (sharded / "anequant.safetensors").unlink()
    with writer.CheckpointWriter(sharded, entries, stem="anequant", shard_bytes=2_000_000) as written:
        for entry in entries:
            written.write(entry.name, checkpoint.read(entry.name))
    assert written.first_file == "anequant.safetensors.index.json" and len(list(sharded.glob("*-of-*"))) > 2
    config = json.loads((sharded / "config.json").read_text())
    config["quantization_config"]["weights"] = written.first_file
    (sharded / "config.json").write_text(json.dumps(config))
    assert torch.equal(run(anequant.load(sharded), tokens), run(anequant.load(everything), tokens))


def test_the_model_without_its_head(everything: Path, tokens: Tensor) -> None:
    with torch.no_grad():
        bare = AutoModel.from_pretrained(everything, dtype=torch.float64)(tokens).last_hidden_state
        whole = anequant.load(everything, dtype=torch.float64)
        assert torch.equal(whole.lm_head(bare), whole(tokens).logits)


def test_load_opens_a_checkpoint_of_weights_alone(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], tokens: Tensor
) -> None:
    for made in (tiny_qwen2, quantize_model(tiny_qwen2, "w4-nearest").folder):
        stock = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
        assert torch.equal(run(anequant.load(made, dtype=torch.float32), tokens), run(stock, tokens))


def test_attention_that_cannot_turn_queries_is_refused(everything: Path) -> None:
    with pytest.raises(UsageError, match="'eager' cannot turn queries"):
        anequant.load(everything, attn_implementation="eager")


@pytest.mark.parametrize("file", [None, "../anequant.safetensors", 7])
def test_weights_must_lie_in_the_folder(everything: Path, tmp_path: Path, file: Any) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(everything, broken)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["weights"] = file
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not name the weights' file"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_it_is_not_saved_as_something_else(everything: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not serializable"):
        anequant.load(everything).save_pretrained(tmp_path / "again")


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = anequant.lode
