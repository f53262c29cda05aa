"""Recipes beyond the default from float model to verified packages: other widths, mixed, folded scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Quantized
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.models import MLModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from anequant.architectures.spec import EMBEDDING, HEAD, layer_prefix
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import open_checkpoint
from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
from anequant.reference.forward import logits
from anequant.request import LowerRequest
from anequant.verification.verify import verify_checkpoint, verify_packages

SIZES = LowerOptions(context=80, batch=16)
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "2 bits": ("w2-ane", {}),
    "3 bits": ("w3-ane", {}),
    "6 bits": ("w6-ane", {}),
    "8 bits, tables": ("w8-ane", {"head_bits": 6, "embedding_bits": 8}),
    "mixed": ("w4-ane", {"target_bits": 5.0, "mixed_bits": "4,6,8"}),
    "mixed, tables": ("w4-ane", {"target_bits": 4.5, "head_bits": 0, "embedding_bits": 0}),
    "folded": ("w4-ane", {"fold_input_scales": True}),
    "uniform": ("w4-ane", {"codebook": "uniform", "scales": "output", "r1": "none", "r2": "none"}),
}


@pytest.fixture(params=RECIPES)
def made(
    request: pytest.FixtureRequest, tiny_qwen2: Path, quantize_model: Callable[..., Quantized]
) -> Quantized:
    name, overrides = RECIPES[request.param]
    return quantize_model(tiny_qwen2, name, **overrides)


def divided_and_snapped(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Codes as ANEMLL recovers them: division in float16, then the midpoints between entries."""
    weight, rows, columns, codebook = (
        tensors[f"{name}.{part}"].half() for part in ("weight", "output_scales", "input_scales", "codebook")
    )
    return torch.bucketize(weight / (columns * rows), (codebook[1:] + codebook[:-1]) / 2)


def test_the_checkpoint_is_what_was_chosen(made: Quantized) -> None:
    tensors = load_file(made.folder / "model.safetensors")
    errors = {error.name: error for error in made.result.rounding.tensors}
    assert errors.keys() == made.chosen.keys()
    for name, chosen in made.chosen.items():
        read = load(name, tensors.__getitem__, tensors)
        assert torch.equal(read.codes, chosen.codes), name
        assert torch.equal(divided_and_snapped(tensors, name), chosen.codes.long()), name
        assert torch.equal(read.codebook, chosen.codebook)
        assert len(read.codebook) == 2 ** errors[name].bits
    assert verify_checkpoint(made.folder).tensors == len(made.chosen)
    tokens = torch.randint(8192, (1, 24), generator=torch.Generator().manual_seed(2))
    stock = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(tokens, use_cache=False).logits[0]
    ours = next(iter(logits(open_checkpoint(made.folder), tokens)))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_packages_compute_what_the_checkpoint_does(made: Quantized, tmp_path: Path) -> None:
    lower(LowerRequest(made.folder, SIZES), tmp_path / "packages")
    check = verify_packages(tmp_path / "packages", made.folder)
    assert check.weights >= 28 and check.agreement + check.ties / check.positions >= 0.99


def test_manifest_says_what_calibration_did(made: Quantized) -> None:
    manifest = json.loads((made.folder / "anequant.json").read_text())
    recorded = manifest["calibration"]
    assert (recorded["source"], recorded["windows"], recorded["length"]) == ("self", 6, 64)
    assert len(recorded["tokens_sha256"]) == 64
    for tensor in manifest["measured"]["tensors"]:
        if "embed" in tensor["name"]:
            assert tensor["damping"] is None and tensor["dead_inputs"] is None
        else:
            assert tensor["dead_inputs"] == 0 and tensor["damping"] in (None, 0.05, 0.2, 1.0)


def test_inputs_that_nothing_uses_are_counted(
    make_model: Callable[..., Path], quantize_model: Callable[..., Quantized], tmp_path: Path
) -> None:
    """Rows of zeros in up, which a uniform codebook keeps, leave inputs of down that are always zero."""
    folder = make_model(tmp_path / "model", "qwen2", False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][[3, 70]] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    made = quantize_model(folder, "w4-ane", codebook="uniform")
    measured = json.loads((made.folder / "anequant.json").read_text())["measured"]
    dead = {tensor["name"]: tensor["dead_inputs"] for tensor in measured["tensors"] if tensor["dead_inputs"]}
    assert dead == {"model.layers.1.mlp.down_proj": 2}


@pytest.mark.parametrize(("recipe", "widths"), [("mixed", {4, 6, 8}), ("mixed, tables", {2, 3, 4, 6, 8})])
def test_mixed_bits_meet_their_target(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], recipe: str, widths: set[int]
) -> None:
    name, overrides = RECIPES[recipe]
    tensors = quantize_model(tiny_qwen2, name, **overrides).result.rounding.tensors
    average = sum(t.bits * t.weights for t in tensors) / sum(t.weights for t in tensors)
    assert {t.bits for t in tensors} <= widths and len({t.bits for t in tensors}) > 1
    assert overrides["target_bits"] - 0.3 <= average <= overrides["target_bits"]
    chosen = {t.name for t in tensors if "_proj" not in t.name}
    assert chosen == ({EMBEDDING, HEAD} if "tables" in recipe else set())


def infer_operations(package: Path) -> list[Any]:
    """The operations of `infer`, by coremltools' reader."""
    model = MLModel(str(package), skip_model_load=True)
    program = load_program(model.get_spec(), model.get_spec().specificationVersion, model.weights_dir)
    return list(program.functions["infer"].operations)


def test_folded_scales_cost_no_multiplication(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], tmp_path: Path
) -> None:
    """Seven input scales a layer, and not one more multiplication than there is otherwise."""
    folded = quantize_model(tiny_qwen2, "w4-ane", fold_input_scales=True)
    tensors = load_file(folded.folder / "model.safetensors")
    plain = quantize_model(tiny_qwen2, "w4-nearest")
    for name, value in tensors.items():
        if name.endswith("input_scales"):
            assert bool((value == 1).all()), name
    counts, gains = {}, {}
    for label, made in (("folded", folded), ("plain", plain)):
        lower(LowerRequest(made.folder, SIZES), tmp_path / label)
        operations = infer_operations(tmp_path / label / "qwen25_FFN_PF_lut4_chunk_01of01.mlpackage")
        counts[label] = sum(operation.op_type == "mul" for operation in operations)
        norms = [operation for operation in operations if operation.op_type == "layer_norm"]
        gains[label] = [norm.gamma.val for norm in norms if norm.gamma is not None]
        assert len(norms) == 9
    assert counts["plain"] - counts["folded"] == 7 * 4
    assert gains["plain"] == []
    names = ("input_layernorm", "post_attention_layernorm")
    expected = [tensors[f"{layer_prefix(layer)}{name}.weight"] for layer in range(4) for name in names]
    for gamma, gain in zip(gains["folded"], expected, strict=True):
        assert np.array_equal(gamma, torch.cat([gain, gain]).numpy())
        assert float(gain.float().std()) > 0.01
