"""Walkers against hooks in two whole transformers models: the float one, and one quantized so far."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from anequant.architectures.spec import layer_prefix
from anequant.calibration.walkers import HELD_OUT, Walkers
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import Source
from anequant.pipeline import rounder
from anequant.pipeline.quantize import quantize
from anequant.quantization import products
from anequant.quantization.calibrated import Rounding, quantize_calibrated
from anequant.quantization.statistics import InputStatistics, Moments
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe
from anequant.request import Request

WINDOWS, LENGTH = 9, 16
LAYER_ALONE = {"hessian": "layer", "correction": 0.0}
"""A recipe whose moments are those of the inputs and outputs as they are."""


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A stand-in for quantized weights that nobody could mistake for the originals."""
    return {
        name: (value * 4).round() / 4 if name.endswith("_proj.weight") else value
        for name, value in tensors.items()
    }


@torch.no_grad()
def hooked_inputs(model: Any, embedded: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Inputs [windows, length, in] of linears by name, and of the head."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.__setitem__(name, inputs[0])
        )
        for name in names
    ]
    model(inputs_embeds=embedded, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def assert_moments(actual: Moments, x: Tensor, x_float: Tensor, weight: Tensor | None = None) -> None:
    """`weight` is that of the one linear that reads the input, None where several do."""
    x, x_float = x.double().flatten(0, 1), x_float.double().flatten(0, 1)
    assert actual.tokens == len(x)
    mixed = actual.cross if weight is None else actual.outputs
    seen = x_float if weight is None else x_float @ weight.double().T
    assert mixed is not None
    for ours, expected in ((actual.hessian, x.T @ x), (mixed, seen.T @ x)):
        expected = expected / len(x)
        assert float((ours - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_moments_are_those_of_the_models_own_inputs(
    make_model: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    folder = make_model(tmp_path / "model", model_type, False)
    checkpoint = open_checkpoint(folder)
    spec = checkpoint.spec
    generator = torch.Generator().manual_seed(3)
    embedded = torch.randn(WINDOWS, LENGTH, spec.hidden_size, generator=generator)
    float_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    current_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    walkers = Walkers(spec, embedded, embedded.half(), exact=True)
    cut = WINDOWS - WINDOWS // HELD_OUT

    for layer in range(spec.num_layers):
        original = {name: value.float() for name, value in checkpoint.layer(layer).items()}
        quantized, current = rounded(original), dict(original)
        for inputs in walkers.layer(layer, original, current, moments=True):
            group = inputs.group
            assert inputs.measure is not None
            seen = inputs.measure(group[-1])
            name = layer_prefix(layer) + group[0].name
            x_float = hooked_inputs(float_model, embedded, [name])[name]
            x = hooked_inputs(current_model, embedded.half().float(), [name])[name]
            assert seen is not None
            weight = original[f"{group[0].name}.weight"] if group[0].norm is None else None
            assert_moments(seen.fit, x[:cut], x_float[:cut], weight)
            assert_moments(seen.held_out, x[cut:], x_float[cut:], weight)
            assert_moments(seen.everything, x, x_float, weight)
            for linear in group:
                name = f"{linear.name}.weight"
                current[name] = quantized[name]
                current_model.get_parameter(layer_prefix(layer) + name).data = quantized[name]

    gain = checkpoint.final_gain().float()
    x_float = hooked_inputs(float_model, embedded, ["lm_head"])["lm_head"]
    x = hooked_inputs(current_model, embedded.half().float(), ["lm_head"])["lm_head"]
    seen = walkers.head_statistics(gain)
    assert_moments(seen.fit, x[:cut], x_float[:cut])
    assert_moments(seen.held_out, x[cut:], x_float[cut:])
    assert_moments(seen.everything, x, x_float)


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_tokens_count_by_their_weights_and_outputs_make_up_for_the_stream(
    make_model: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    """Against sums over single tokens in float64, of what hooks in two whole models see: inputs of every
    linear, and of the norm before it, which is the residual stream."""
    folder = make_model(tmp_path / "model", model_type, False)
    checkpoint = open_checkpoint(folder)
    spec, generator = checkpoint.spec, torch.Generator().manual_seed(3)
    embedded = torch.randn(WINDOWS, LENGTH, spec.hidden_size, generator=generator)
    names = [
        layer_prefix(layer) + linear.name
        for layer in range(spec.num_layers)
        for linear in spec.architecture.linears
    ]
    weights = {name: torch.rand(WINDOWS, LENGTH, generator=generator).square() for name in names}
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2)]
    walkers = Walkers(spec, embedded, embedded.half(), weights=weights, compensation=0.3, exact=True)
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    cut = WINDOWS - WINDOWS // HELD_OUT

    for layer in range(spec.num_layers):
        original = {name: value.float() for name, value in checkpoint.layer(layer).items()}
        quantized, current = rounded(original), dict(original)
        for inputs in walkers.layer(layer, original, current, moments=True):
            assert inputs.measure is not None
            for linear in inputs.group:
                name = layer_prefix(layer) + linear.name
                stream = layer_prefix(layer) + norms[linear.name.partition(".")[0]]
                (x_float, before), (x, now) = (
                    (found[name].double(), found[stream].double())
                    for found in (
                        hooked_inputs(models[0], embedded, [name, stream]),
                        hooked_inputs(models[1], embedded.half().float(), [name, stream]),
                    )
                )
                seen = x_float
                if linear.norm is None:
                    seen = x_float @ original[f"{linear.name}.weight"].double().T + 0.3 * (before - now)
                counted = inputs.measure(linear)
                for moments, some in ((counted.fit, slice(cut)), (counted.held_out, slice(cut, None))):
                    expected = torch.einsum(
                        "nt,nti,ntj->ij", weights[name][some].double(), seen[some], x[some]
                    )
                    hessian = torch.einsum("nt,nti,ntj->ij", weights[name][some].double(), x[some], x[some])
                    mixed = moments.cross if linear.norm is not None else moments.outputs
                    assert mixed is not None
                    for ours, theirs in ((mixed, expected), (moments.hessian, hessian)):
                        theirs = theirs / x[some][..., 0].numel()
                        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm()), name
            for linear in inputs.group:
                name = f"{linear.name}.weight"
                current[name] = quantized[name]
                models[1].get_parameter(layer_prefix(layer) + name).data = quantized[name]


@pytest.mark.parametrize("stubbed", [False, True], ids=["as-probed", "without-bfloat16"])
def test_this_processors_products_change_moments_little(
    tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch, stubbed: bool
) -> None:
    """By less than 1% at the end of a trained model, as performance.md says, and in float32 by the order of
    sums at most."""
    if stubbed:
        monkeypatch.setattr(products, "has_bfloat16", lambda: False)
        monkeypatch.setattr(products, "has_slow_blas", lambda: False)
    checkpoint = open_checkpoint(tiny_qwen2)
    spec = checkpoint.spec
    tokens = torch.randint(spec.vocab_size, (WINDOWS, 64), generator=torch.Generator().manual_seed(3))
    embedded = checkpoint.read("model.embed_tokens.weight")[tokens].float()

    def walk(exact: bool) -> list[Tensor]:
        walkers = Walkers(spec, embedded, embedded, exact=exact)
        found: list[Tensor] = []
        for layer in range(spec.num_layers):
            original = {name: value.float() for name, value in checkpoint.layer(layer).items()}
            current = rounded(original)
            for inputs in walkers.layer(layer, original, current, moments=True):
                assert inputs.measure is not None
                seen = inputs.measure(inputs.group[0])
                product = seen.fit.cross if seen.fit.outputs is None else seen.fit.outputs
                assert product is not None
                found += [seen.fit.hessian, product]
        return found

    pairs = zip(walk(exact=False), walk(exact=True), strict=True)
    errors = [float((ours - exact).norm() / exact.norm()) for ours, exact in pairs]
    assert max(errors) < 0.01, errors
    assert (max(errors) > 1e-4) == products.has_bfloat16(), errors


def test_a_single_window_serves_both_ends(make_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "model", "llama", False))
    embedded = torch.randn(1, LENGTH, 128, generator=torch.Generator().manual_seed(1))
    original = {name: value.float() for name, value in checkpoint.layer(0).items()}
    walkers = Walkers(checkpoint.spec, embedded, embedded)
    first = next(walkers.layer(0, original, original, moments=True))
    assert first.measure is not None
    for seen in (first.measure(first.group[0]), walkers.head_statistics(torch.ones(128))):
        assert seen is not None and seen.fit.cross is not None
        assert torch.equal(seen.fit.hessian, seen.held_out.hessian)
        torch.testing.assert_close(seen.fit.hessian, seen.fit.cross)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_the_pass_sees_the_inputs_of_the_model_that_it_writes(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Inputs depend on what comes before alone, so the finished model shows them all. Folding takes the
    gain out of what a norm feeds."""
    folder = make_model(tmp_path / "model", model_type, False, num_hidden_layers=2)
    tokens = torch.randint(97, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
    (tmp_path / "calib.json").write_text(json.dumps(tokens.tolist()))
    seen: dict[str, InputStatistics] = {}

    def spy(
        weight: Tensor,
        bias: Tensor | None,
        statistics: InputStatistics,
        rounding: Rounding,
        name: str,
        input_scale: Tensor | None,
    ) -> Any:
        seen[name] = statistics
        return quantize_calibrated(weight, bias, statistics, rounding, name, input_scale)

    monkeypatch.setattr(rounder, "quantize_calibrated", spy)
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    monkeypatch.setattr(products, "has_slow_blas", lambda: False)
    recipe = load_recipe(
        None, {"r1": "none", "r2": "none", "embedding_bits": 4, "head_bits": 4, **LAYER_ALONE}
    )
    calibration = Calibration((str(tmp_path / "calib.json"),), WINDOWS, LENGTH)
    quantize(Request(Source(folder, "model"), recipe, calibration), tmp_path / "written")

    checkpoint = open_checkpoint(folder)
    gains = {"lm_head": checkpoint.final_gain()}
    for layer in range(2):
        for linear in checkpoint.spec.architecture.linears:
            prefix = layer_prefix(layer)
            if linear.norm:
                gains[prefix + linear.name] = checkpoint.read(f"{prefix}{linear.norm}.weight")
    assert len(seen) == 15 and len(gains) == 11
    original, written = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder, tmp_path / "written")
    )
    names = list(seen)
    x_float, x = (
        hooked_inputs(model, model.get_input_embeddings()(tokens), names) for model in (original, written)
    )
    for name, statistics in seen.items():
        reference = x_float[name] / gains.get(name, 1.0)
        alone = name.endswith(("o_proj", "down_proj"))
        weight = original.get_parameter(f"{name}.weight").detach() if alone else None
        assert_moments(statistics.fit, x[name][:-1], reference[:-1], weight)
        assert_moments(statistics.held_out, x[name][-1:], reference[-1:], weight)
