"""The written checkpoint: its contract, the codes others recover, and what stock transformers sees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Quantized
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from anequant.checkpoints.quantized import load, store
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import Source
from anequant.errors import InputError, UsageError, VerificationError
from anequant.pipeline.quantize import quantize
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.weight_format import WeightFormat
from anequant.recipe import Recipe
from anequant.request import Request

PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
RECIPES: dict[str, tuple[str, dict[str, int]]] = {
    "w4-nearest": ("w4-nearest", {}),
    "w8-nearest": ("w8-nearest", {}),
    "w_int4_per_tensor": ("w_int4_per_tensor", {}),
    "w_int8_per_tensor": ("w_int8_per_tensor", {}),
    "tables-4": ("w4-nearest", {"head_bits": 4, "embedding_bits": 4}),
    "tables-6": ("w4-nearest", {"head_bits": 6, "embedding_bits": 6}),
    "tables-8": ("w_int4_per_tensor", {"head_bits": 8, "embedding_bits": 8}),
}


@pytest.fixture(params=RECIPES)
def written(
    request: pytest.FixtureRequest, quantize_model: Callable[..., Quantized], tiny_qwen2: Path
) -> Quantized:
    name, overrides = RECIPES[request.param]
    return quantize_model(tiny_qwen2, name, **overrides)


def anemll_codes(tensors: dict[str, Tensor], name: str) -> Tensor:
    """ANEMLL's de-fusing: everything in float16, the quotient snapped at the midpoints of the entries."""
    weight, input_scales, output_scales, codebook = (
        tensors[f"{name}.{part}"].half() for part in ("weight", "input_scales", "output_scales", "codebook")
    )
    core = weight / (input_scales * output_scales)
    entries, order = codebook.sort()
    return order[torch.bucketize(core, (entries[1:] + entries[:-1]) / 2)]


def test_another_reader_recovers_every_code(written: Quantized) -> None:
    tensors = load_file(written.folder / "model.safetensors")
    names = [f"model.layers.{layer}.{name}" for layer in range(4) for name in PROJECTIONS]
    names += ["lm_head"] if written.recipe.head_bits < 16 else []
    names += ["model.embed_tokens"] if written.recipe.embedding_bits < 16 else []
    assert set(written.chosen) == set(names)
    for name in names:
        assert torch.equal(anemll_codes(tensors, name), written.chosen[name].codes.long()), name


def test_our_reader_returns_what_was_written(written: Quantized) -> None:
    checkpoint = open_checkpoint(written.folder)
    assert checkpoint.is_quantized
    for name, chosen in written.chosen.items():
        read = load(name, checkpoint.read, checkpoint.tensors)
        assert torch.equal(read.codes, chosen.codes), name
        assert torch.equal(read.codebook, chosen.codebook)
        assert torch.equal(read.input_scale, chosen.input_scale)
        assert torch.equal(read.output_scale, chosen.output_scale)
        assert (read.bias is None) == (chosen.bias is None)
        assert read.bias is None or chosen.bias is None or torch.equal(read.bias, chosen.bias)


def expected_layout(recipe: Recipe) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Section 5 of the design for tiny-qwen2, spelt out."""
    half, full = torch.float16, torch.float32
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"model.norm.weight": (half, (192,))}
    shapes = {"q": (192, 192), "k": (64, 192), "v": (64, 192), "o": (192, 192)}
    shapes |= {"gate": (576, 192), "up": (576, 192), "down": (192, 576)}

    def linear(name: str, shape: tuple[int, int], bits: int, bias: bool) -> None:
        layout[f"{name}.weight"] = (half, shape)
        if bits < 16:
            layout[f"{name}.input_scales"] = (full, (1, shape[1]))
            layout[f"{name}.output_scales"] = (full, (shape[0], 1))
            layout[f"{name}.codebook"] = (full, (2**bits,))
        if bias:
            layout[f"{name}.bias"] = (half, (shape[0],))

    for layer in range(4):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layout[f"model.layers.{layer}.{norm}.weight"] = (half, (192,))
        for name in PROJECTIONS:
            shape = shapes[name.split(".")[1].removesuffix("_proj")]
            linear(f"model.layers.{layer}.{name}", shape, recipe.bits, bias=True)
    linear("model.embed_tokens", (8192, 192), recipe.embedding_bits, bias=False)
    linear("lm_head", (8192, 192), recipe.head_bits, bias=False)
    return layout


def test_the_contract(written: Quantized) -> None:
    tensors = load_file(written.folder / "model.safetensors")
    actual = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert actual == expected_layout(written.recipe)
    for name, tensor in tensors.items():
        assert bool(torch.isfinite(tensor).all()), name
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        if name.endswith(".codebook"):
            assert bool((tensor.diff() > 0).all()), name
        if name.endswith(".output_scales"):
            assert bool((tensor != 0).all()), name
            bias = tensors.get(name.replace("output_scales", "bias"))
            if bias is not None:
                assert float((bias.float() / tensor[:, 0]).abs().max()) < 65504, name
        if name.endswith((".input_scales", ".output_scales", ".codebook")):
            assert torch.equal(tensor, tensor.half().float()), name
        if name.endswith(".bias"):
            has_bias = any(part in name for part in ("q_proj", "k_proj", "v_proj"))
            assert bool(tensor.any()) == has_bias, name


def test_the_stored_weight_is_the_product(written: Quantized) -> None:
    tensors = load_file(written.folder / "model.safetensors")
    for name in written.chosen:
        core = tensors[f"{name}.codebook"].double()[anemll_codes(tensors, name)]
        product = tensors[f"{name}.output_scales"].double() * core * tensors[f"{name}.input_scales"].double()
        difference = (tensors[f"{name}.weight"].double() - product).abs()
        assert bool((difference <= product.abs() * 2.0**-11 * 1.001 + 2.0**-25).all()), name


def test_the_files_beside_the_weights(written: Quantized) -> None:
    config = json.loads((written.folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "quantization_config" not in config and "auto_map" not in config
    published = json.loads((written.folder / "quantization_config.json").read_text())
    assert published["weight_bits"] == written.recipe.bits and published["model_type"] == "qwen2"
    assert published["rotated"] is (written.recipe.r1 != "none")
    assert published["layers_quantized"] == len(written.chosen)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        assert (written.folder / name).read_bytes() == (written.source / name).read_bytes()
    manifest = json.loads((written.folder / "anequant.json").read_text())
    assert manifest["recipe"] == written.recipe.to_dict()
    assert manifest["measured"]["equivalence"] == pytest.approx(written.result.rounding.equivalence, rel=1e-5)
    assert written.result.rounding.equivalence <= 1e-6
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((written.folder / name).read_bytes()).hexdigest() == digest, name
    source_weights = (written.source / "model.safetensors").read_bytes()
    assert manifest["source"]["files"]["model.safetensors"] == hashlib.sha256(source_weights).hexdigest()
    assert set(manifest["files"]) | {"anequant.json"} == {path.name for path in written.folder.iterdir()}


# --- stock transformers -------------------------------------------------------------------------------


@torch.no_grad()
def stock_logits(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


@torch.no_grad()
def logits_of_decisions(written: Quantized, tokens: Tensor) -> Tensor:
    """The source's own class, untied, with every chosen QuantizedLinear as a plain float32 weight.

    Norms, and tables that stay float, come from the checkpoint's float16.
    """
    config = AutoConfig.from_pretrained(written.source)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config).float().eval()
    stored = load_file(written.folder / "model.safetensors")
    state = {name: stored[name].float() for name in model.state_dict() if "proj." not in name}
    for name, chosen in written.chosen.items():
        state[f"{name}.weight"] = chosen.dequantize()
        if chosen.bias is not None:
            state[f"{name}.bias"] = chosen.bias
    model.load_state_dict(state, strict=True)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def some_tokens() -> Tensor:
    return torch.randint(8192, (2, 96), generator=torch.Generator().manual_seed(2))


def test_stock_transformers_sees_the_quantized_model(written: Quantized) -> None:
    actual = stock_logits(written.folder, some_tokens())
    expected = logits_of_decisions(written, some_tokens())
    assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-3
    assert AutoTokenizer.from_pretrained(written.folder)("The old house").input_ids


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_eight_bits_of_any_architecture_are_close_to_its_float_model(
    make_model: Callable[..., Path], quantize_model: Callable[..., Quantized], tmp_path: Path, model_type: str
) -> None:
    """All biases of the architecture, an untied head, and rotations: nothing may be lost on the way."""
    source = make_model(tmp_path / "model", model_type, False)
    written = quantize_model(source, "w8-nearest")
    tokens = some_tokens() % 97
    original, actual = stock_logits(source, tokens), stock_logits(written.folder, tokens)
    assert float((actual - original).norm() / original.norm()) < 0.05
    expected = logits_of_decisions(written, tokens)
    assert float((actual - expected).norm() / expected.norm()) <= 1e-3


def test_reported_errors_are_those_of_the_stored_weights(written: Quantized) -> None:
    tensors = load_file(written.folder / "model.safetensors")
    assert {error.name for error in written.result.rounding.tensors} == set(written.chosen)
    for error in written.result.rounding.tensors:
        weight, chosen = written.weights[error.name].double(), written.chosen[error.name]
        difference = (tensors[f"{error.name}.weight"].double() - weight).norm() / weight.norm()
        assert error.relative_error == pytest.approx(float(difference), rel=1e-5), error.name
        assert error.bits == chosen.bits
    sizes = [(chosen.codes.numel(), chosen.bits) for chosen in written.chosen.values()]
    sizes += [(8192 * 192, 16) for name in ("lm_head", "model.embed_tokens") if name not in written.chosen]
    total, count = sum(size * bits for size, bits in sizes), sum(size for size, _ in sizes)
    assert written.result.rounding.bits_per_weight == pytest.approx(total / count)


# --- runs ---------------------------------------------------------------------------------------------


def test_the_same_input_and_recipe_give_the_same_bytes(
    quantize_model: Callable[..., Quantized], tiny_qwen2: Path, tmp_path: Path
) -> None:
    first = quantize_model(tiny_qwen2, "w4-nearest")
    quantize(Request(Source(tiny_qwen2, tiny_qwen2.name), first.recipe), tmp_path / "again")
    for path in first.folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_quantized_checkpoint_is_not_quantized_again(
    quantize_model: Callable[..., Quantized], tiny_qwen2: Path, tmp_path: Path
) -> None:
    first = quantize_model(tiny_qwen2, "w4-nearest")
    with pytest.raises(InputError, match="already quantized"):
        quantize(Request(Source(first.folder, "model"), first.recipe), tmp_path / "again")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept(tiny_qwen2: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        quantize(Request(Source(tiny_qwen2, "tiny"), Recipe()), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


# --- store and load -----------------------------------------------------------------------------------


def some_linear() -> QuantizedLinear:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)) * 0.1
    return quantize_linear(weight, torch.ones(12), WeightFormat(4, "lut", "balanced"), "P")


def test_codes_that_float16_loses_are_refused() -> None:
    linear = some_linear()
    close = QuantizedLinear(
        linear.codes, torch.linspace(1, 1.001, 16), linear.input_scale, linear.output_scale, linear.bias
    )
    with pytest.raises(VerificationError, match=r"'some\.linear' cannot be recovered"):
        store("some.linear", close, bias=True)


@pytest.mark.parametrize("part", ["weight", "input_scales", "output_scales"])
def test_a_missing_part_is_named(part: str) -> None:
    tensors = store("P", some_linear(), bias=True)
    del tensors[f"P.{part}"]
    with pytest.raises(InputError, match=rf"'P\.{part}' is missing"):
        load("P", tensors.__getitem__, tensors)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("input_scales", torch.ones(1, 19)),
        ("input_scales", torch.ones(20)),
        ("output_scales", torch.zeros(12, 1)),
        ("codebook", torch.ones(16)),
        ("codebook", torch.ones(1)),
        ("codebook", torch.arange(257.0)),
    ],
)
def test_a_wrong_part_is_named(part: str, value: Tensor) -> None:
    tensors = {**store("P", some_linear(), bias=True), f"P.{part}": value}
    with pytest.raises(InputError, match=rf"'P\.{part}' must"):
        load("P", tensors.__getitem__, tensors)


def test_negative_output_scales_of_others_are_read() -> None:
    """ANEMLL's own producer flips the sign of some rows."""
    linear = some_linear()
    flipped = linear.output_scale.clone()
    flipped[::2] *= -1
    other = QuantizedLinear(linear.codes, linear.codebook, linear.input_scale, flipped, linear.bias)
    tensors = store("P", other, bias=True)
    read = load("P", tensors.__getitem__, tensors)
    assert torch.equal(read.codes, linear.codes)
    assert torch.equal(read.dequantize(), other.dequantize())
