"""Ranges against stock transformers, and models that only run in float16 because they were scaled."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quantized
from files import edit_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from anequant.calibration.ranges import find_power_of_two, measure_ranges
from anequant.checkpoints.layers import load_layer, open_quantized
from anequant.errors import AnequantError, UnsupportedError, VerificationError
from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
from anequant.request import LowerRequest
from anequant.runtime.coreml_backend import PackageModel
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.meta import read_meta
from anequant.targets.shared import headroom
from anequant.verification.verify import verify_packages

SIZES = LowerOptions(context=32, batch=16)
LOUD = 2.0**13
Change = Callable[[dict[str, Tensor]], None]


def changed(folder: Path, change: Change) -> Path:
    """A model whose tensors are changed in place."""
    edit_tensors(folder, change)
    return folder


def scale(tensors: dict[str, Tensor], ending: str, factor: float) -> None:
    for name in tensors:
        if name.endswith(ending):
            tensors[name] *= factor


def loud_stream(tensors: dict[str, Tensor]) -> None:
    """The residual stream beyond float16; every norm's output stays what it was."""
    scale(tensors, "embed_tokens.weight", LOUD)
    for name in ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias"):
        scale(tensors, name, LOUD)


def loud_product(tensors: dict[str, Tensor]) -> None:
    """SwiGLU products near the end of float16: down's sums leave the accumulator."""
    scale(tensors, "up_proj.weight", 2.0**10)
    scale(tensors, "down_proj.weight", 2.0**-10)


def loud_scores(tensors: dict[str, Tensor]) -> None:
    scale(tensors, "q_proj.bias", 200.0)
    scale(tensors, "k_proj.bias", 200.0)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_ranges_are_those_of_the_model(
    make_model: Callable[..., Path], quantize_model: Callable[..., Quantized], tmp_path: Path, model_type: str
) -> None:
    folder = quantize_model(make_model(tmp_path / "model", model_type, False), "w4-nearest").folder
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    checkpoint = open_quantized(folder)
    ranges = measure_ranges(checkpoint, tokens)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():

        def keep(module: Any, given: Any, output: Any, name: str = name) -> None:
            seen[name] = output
            if given:
                inputs[name] = given[0]

        if name.endswith(("_proj", "q_norm", "k_norm")) or name.count(".") == 2:
            module.register_forward_hook(keep)
    with torch.no_grad():
        model(tokens, use_cache=False)
    spec = checkpoint.spec
    cos, sin = model.model.rotary_emb(torch.empty(1), torch.arange(24)[None])
    for number, ours in enumerate(ranges):
        prefix = f"model.layers.{number}"
        parts = [
            seen[prefix],
            inputs[prefix],
            seen[f"{prefix}.mlp.down_proj"],
            seen[f"{prefix}.self_attn.o_proj"],
            inputs[prefix] + seen[f"{prefix}.self_attn.o_proj"],
        ]
        assert ours.residual == pytest.approx(max(float(part.abs().max()) for part in parts), rel=1e-4)
        names = [f"{prefix}.mlp.{name}_proj" for name in ("gate", "up")]
        names += [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
        others = [seen[name] for name in names] + [
            inputs[name] for name in inputs if name.startswith(prefix + ".")
        ]
        loudest = max(float(other.abs().max()) for other in others if other.ndim == 3)
        assert ours.products == pytest.approx(loudest, rel=1e-4)

        def heads(side: str, prefix: str = prefix) -> Tensor:
            key = f"{prefix}.self_attn.{side}_norm"
            value = seen[key] if key in seen else seen[f"{prefix}.self_attn.{side}_proj"]
            value = value.reshape(2, 24, -1, spec.head_dim)
            return value.transpose(1, 2)

        query, key = apply_rotary_pos_emb(heads("q"), heads("k"), cos, sin)
        scores = query @ repeat_kv(key, spec.num_heads // spec.num_key_value_heads).transpose(2, 3)
        scores = scores.masked_fill(~torch.ones(24, 24, dtype=torch.bool).tril(), 0) * spec.head_dim**-0.5
        assert ours.scores == pytest.approx(float(scores.abs().max()), rel=1e-4)

        layer = load_layer(checkpoint, number)
        for name, linear in layer.linears.items():
            x = inputs[f"{prefix}.{name}"].flatten(0, 1) * linear.input_scale
            bound = float((x.abs() @ linear.codebook[linear.codes.long()].abs().T).max())
            assert 0.9 * bound <= ours.sums[name] <= bound * (1 + 1e-5)


def run(folder: Path) -> Tensor:
    model = PackageModel(folder)
    return torch.stack([model.feed(list(range(1, 17))), *(model.feed([token]) for token in range(20, 26))])


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_loud_stream_is_scaled_exactly(
    make_model: Callable[..., Path],
    quantize_model: Callable[..., Quantized],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    source = changed(make_model(tmp_path / "model", model_type, False, vocab_size=112), loud_stream)
    folder = quantize_model(source, "w4-nearest").folder
    result = lower(LowerRequest(folder, SIZES), tmp_path / "out")
    peak = max(layer.residual for layer in result.headroom.ranges)
    assert peak > 65504 and peak * result.headroom.residual_scale <= 65504 / 4
    assert verify_packages(tmp_path / "out", folder).agreement >= 0.99
    recorded = json.loads((tmp_path / "out" / "anequant.json").read_text())["headroom"]
    assert recorded["residual_scale"] == result.headroom.residual_scale < 1

    monkeypatch.setattr(headroom, "find_power_of_two", lambda value, most: 1.0)
    lower(LowerRequest(folder, SIZES), tmp_path / "unscaled")
    assert not bool(run(tmp_path / "unscaled").isfinite().all())
    assert bool(run(tmp_path / "out").isfinite().all())


def test_a_scaled_model_computes_what_the_quiet_one_does(
    make_model: Callable[..., Path], quantize_model: Callable[..., Quantized], tmp_path: Path
) -> None:
    """The same model with a stream of float16's size; all factors are powers of two."""
    options: dict[str, Any] = {"vocab_size": 112, "rms_norm_eps": 1e-12}
    quiet = make_model(tmp_path / "quiet", "qwen2", False, **options)
    loud = changed(make_model(tmp_path / "loud", "qwen2", False, **options), loud_stream)
    for name, model in (("quiet", quiet), ("loud", loud)):
        lower(
            LowerRequest(quantize_model(model, "w4-nearest", r1="none").folder, SIZES),
            tmp_path / f"{name}-out",
        )
    first, second = run(tmp_path / "quiet-out"), run(tmp_path / "loud-out")
    assert float((first - second).abs().max()) <= 0.02 * float(first.abs().max())


def test_loud_sums_move_from_codebook_to_scales(
    make_model: Callable[..., Path], quantize_model: Callable[..., Quantized], tmp_path: Path
) -> None:
    source = changed(make_model(tmp_path / "model", "qwen2", False, vocab_size=112), loud_product)
    folder = quantize_model(source, "w4-nearest").folder
    result = lower(LowerRequest(folder, SIZES), tmp_path / "out")
    assert result.headroom.residual_scale == 1
    moved = result.headroom.sum_scales
    assert set(moved) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(3)}
    for layer in result.headroom.ranges:
        factor = moved[f"model.layers.{layer.layer}.mlp.down_proj"]
        assert layer.sums["mlp.down_proj"] * factor <= 32768 / 4 < 2 * layer.sums["mlp.down_proj"] * factor
    check = verify_packages(tmp_path / "out", folder)
    assert check.weights == 21 and check.agreement >= 0.99
    chunk = Package.open(tmp_path / "out" / f"{read_meta(tmp_path / 'out').chunk_names[0]}.mlpackage")
    stored = {value: weight for _, value, weight in chunk.read_compressed_weights()}
    (name,) = [name for name in stored if "layers_1_mlp_down_proj" in name]
    whole = load_layer(open_quantized(folder), 1).linears["mlp.down_proj"]
    expected = whole.codebook * moved["model.layers.1.mlp.down_proj"]
    codebook = stored[name].codebook
    assert codebook is not None
    assert torch.equal(torch.from_numpy(codebook.reshape(-1).astype("float32")), expected)


def test_what_must_overflow_is_refused(
    make_model: Callable[..., Path], quantize_model: Callable[..., Quantized], tmp_path: Path
) -> None:
    source = changed(make_model(tmp_path / "model", "qwen2", False, vocab_size=112), loud_scores)
    folder = quantize_model(source, "w4-nearest", r2="none").folder
    with pytest.raises(UnsupportedError, match=r"q \. k in layer 0 reaches .* 65504") as caught:
        lower(LowerRequest(folder, SIZES), tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bias", "refused"), [(5.0, None), (15.0, VerificationError), (100.0, UnsupportedError)]
)
def test_scores_too_coarse_for_float16_are_named(
    make_model: Callable[..., Path],
    quantize_model: Callable[..., Quantized],
    tmp_path: Path,
    bias: float,
    refused: type[AnequantError] | None,
) -> None:
    """Biases of q and k make scores that float16 holds, in steps that softmax does not bear."""

    def coarse(tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            if name.endswith(("q_proj.bias", "k_proj.bias")):
                tensors[name] = bias * value.sign()

    sizes = {"vocab_size": 112, "num_attention_heads": 8}
    source = changed(make_model(tmp_path / "model", "qwen2", False, **sizes), coarse)
    folder = quantize_model(source, "w8-nearest", r2="none").folder
    found = measure_ranges(open_quantized(folder), torch.arange(1, 33)[None])
    for layer in found:
        assert layer.scores < 65504 and layer.attention <= math.tanh(layer.scores * 2**-11 + 2**-9)

    def both() -> None:
        lower(LowerRequest(folder, SIZES), tmp_path / "out")
        verify_packages(tmp_path / "out", folder)

    if refused is None:
        both()
        return
    with pytest.raises(refused) as caught:
        both()
    assert re.search(
        r"scores q \. k in layer \d reach \S+, .* \d+% of a token's attention", str(caught.value)
    )
    assert caught.value.remedy and (tmp_path / "out").exists() == (refused is VerificationError)


@pytest.mark.parametrize(
    ("value", "most", "factor"), [(1, 2, 1), (2, 2, 1), (2.1, 2, 0.5), (9, 2, 0.125), (1e9, 1, 2.0**-30)]
)
def test_powers_of_two(value: float, most: float, factor: float) -> None:
    assert find_power_of_two(value, most) == factor
