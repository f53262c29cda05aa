"""Layer-by-layer gradients against autograd through whole models, and what distillation achieves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quantized
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from anequant.architectures.spec import layer_prefix
from anequant.calibration.distill import (
    PATIENCE,
    Course,
    Heads,
    LearnResult,
    Lesson,
    Student,
    TunableLayer,
    distill,
)
from anequant.checkpoints.layers import load_layer, open_quantized
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.jobs.control import Progress, silent
from anequant.quantization.tunable_linear import start_tuning
from anequant.reference.forward import ReferenceModel, differentiate_head, run_to_final_states, sum_head_loss
from anequant.reference.sources import read_text
from anequant.reference.windows import cut_windows, load_tokenizer


def tunable_layer(checkpoint: Checkpoint, number: int) -> TunableLayer:
    loaded = load_layer(checkpoint, number)
    return TunableLayer(
        {name: start_tuning(linear) for name, linear in loaded.linears.items()},
        {name: gain.float().requires_grad_() for name, gain in loaded.gains.items()},
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_gradients_through_layers_and_head_are_autograds(
    make_model: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    folder = make_model(tmp_path / "model", model_type, False)
    checkpoint = open_checkpoint(folder)
    spec = checkpoint.spec
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = whole(tokens, use_cache=False).logits
    (-logits.log_softmax(-1)[..., 0].sum()).backward()

    model = ReferenceModel(spec, torch.float32)
    layers = [
        {name: value.float() for name, value in checkpoint.layer(layer).items()}
        for layer in range(spec.num_layers)
    ]
    head = checkpoint.read(checkpoint.head_name).float()
    hidden = [checkpoint.read("model.embed_tokens.weight").float()[tokens]]
    for layer, tensors in enumerate(layers):
        hidden.append(model.run_layer(layer, tensors, hidden[-1]))

    def loss(states: Tensor, _: Tensor) -> Tensor:
        return -(states @ head.T).log_softmax(-1)[..., 0].sum()

    gain = checkpoint.final_gain().float()
    last = hidden.pop()
    value = sum_head_loss(model, last, gain, last, loss)
    assert value == pytest.approx(float(-logits.detach().log_softmax(-1)[..., 0].sum()), rel=1e-5)
    gradient, gain_gradient = differentiate_head(model, last, gain, last, loss)
    expected = whole.get_parameter("model.norm.weight").grad
    assert float((gain_gradient - expected).norm()) <= 1e-4 * float(expected.norm())
    for layer in reversed(range(spec.num_layers)):
        gradient, gradients = model.gradients(layer, layers[layer], hidden.pop(), gradient)
        assert gradients.keys() == layers[layer].keys()
        for name, ours in gradients.items():
            expected = whole.get_parameter(layer_prefix(layer) + name).grad
            assert float((ours - expected).norm()) <= 1e-3 * float(expected.norm()) + 1e-6, name


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_step_descends_the_divergence_of_whole_models(
    make_model: Callable[..., Path], quantize_model: Callable[..., Quantized], tmp_path: Path, model_type: str
) -> None:
    """Gradients of every codebook, scale, bias and gain, by autograd through transformers' whole model. One
    step on all windows leaves them in the leaves."""
    folder = make_model(tmp_path / "model", model_type, False, num_hidden_layers=2)
    quantized = open_quantized(quantize_model(folder, "w4-nearest").folder)
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        taught = model.model(tokens, use_cache=False).last_hidden_state
        log_p = model(tokens, use_cache=False).logits.log_softmax(-1)
    embedding = quantized.read("model.embed_tokens.weight")
    head = quantized.read("lm_head.weight")
    heads = Heads(
        model.lm_head.weight.detach().float(),
        head.float(),
        quantized.read("model.norm.weight").float().requires_grad_(),
    )
    layers = [tunable_layer(quantized, number) for number in range(2)]

    weights = {"model.embed_tokens.weight": embedding.double(), "lm_head.weight": head.double()}
    leaves: list[Tensor] = []
    for number, layer in enumerate(layers):
        prefix = layer_prefix(number)
        for name, linear in layer.linears.items():
            own = [leaf.detach().double().requires_grad_() for leaf in linear.parameters]
            codebook, log_rows, log_columns = own[:3]
            weights[f"{prefix}{name}.weight"] = (
                log_rows.exp()[:, None] * codebook[linear.codes.long()] * log_columns.exp()
            )
            if f"{prefix}{name}.bias" in dict(model.named_parameters()):
                weights[f"{prefix}{name}.bias"] = own[3]
            leaves += own
        for name, gain in layer.gains.items():
            weights[f"{prefix}{name}.weight"] = gain.detach().double().requires_grad_()
            leaves.append(weights[f"{prefix}{name}.weight"])
    weights["model.norm.weight"] = heads.gain.detach().double().requires_grad_()
    leaves.append(weights["model.norm.weight"])
    logits = torch.func.functional_call(model, weights, (tokens,), {"use_cache": False}).logits
    kl = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean()
    kl.backward()

    lesson = Lesson(embedding.float()[tokens], taught.float())
    result = distill(Student(quantized.spec, layers, heads), Course(lesson, lesson, steps=1, seed=0))
    assert result.held_out_before == pytest.approx(kl.item(), rel=1e-5)
    ours = [leaf for layer in layers for leaf in layer.parameters] + [heads.gain]
    for leaf, expected in zip(ours, leaves, strict=True):
        if expected.grad is None:
            assert leaf.grad is None
        else:
            assert leaf.grad is not None
            assert float((leaf.grad - expected.grad).norm()) <= 1e-4 * float(expected.grad.norm()) + 1e-7


# --- distillation -------------------------------------------------------------------------------------

STEPS = 25


@pytest.fixture(scope="module")
def lessons(tiny_qwen2: Path, quantize_model: Callable[..., Quantized]) -> dict[str, Any]:
    """The bundled model at 3 bits, and windows of the bundled text."""
    original = open_checkpoint(tiny_qwen2)
    folder = quantize_model(tiny_qwen2, "w4-nearest", bits=3).folder
    quantized = open_quantized(folder)
    tokenizer = load_tokenizer(tiny_qwen2)
    tokens = cut_windows(read_text(SAMPLE_TEXT), tokenizer, 8189, count=10, length=64)
    taught = run_to_final_states(original, tokens)
    embedded = quantized.read("model.embed_tokens.weight").float()[tokens]
    return {
        "spec": quantized.spec,
        "quantized": quantized,
        "tokens": tokens,
        "lesson": Lesson(embedded[3:], taught[3:]),
        "held_out": Lesson(embedded[:3], taught[:3]),
        "taught_head": original.read(original.head_name).float(),
    }


def train(
    lessons: dict[str, Any], steps: int, progress: Progress = silent
) -> tuple[LearnResult, list[TunableLayer], Heads]:
    quantized = lessons["quantized"]
    layers = [tunable_layer(quantized, number) for number in range(quantized.spec.num_layers)]
    heads = Heads(
        lessons["taught_head"],
        quantized.read("lm_head.weight").float(),
        quantized.read("model.norm.weight").float().requires_grad_(),
    )
    course = Course(lessons["lesson"], lessons["held_out"], steps, seed=0)
    result = distill(Student(lessons["spec"], layers, heads), course, progress)
    return result, layers, heads


def leaves_of(layers: list[TunableLayer], heads: Heads) -> list[Tensor]:
    return [leaf.detach() for layer in layers for leaf in layer.parameters] + [heads.gain.detach()]


def divergence(lessons: dict[str, Any], layers: list[TunableLayer], heads: Heads) -> float:
    """KL on the held-out windows from literal logits in float64."""
    model = ReferenceModel(lessons["spec"], torch.float32)
    hidden = lessons["held_out"].embedded
    for number, layer in enumerate(layers):
        hidden = model.run_layer(number, layer.tensors(), hidden)
    ours = (model.final_norm(hidden, heads.gain.detach()) @ heads.own.T).double().log_softmax(-1)
    theirs = (lessons["held_out"].taught @ heads.taught.T).double().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_distillation_lowers_the_divergence_on_held_out_windows(lessons: dict[str, Any]) -> None:
    result, layers, heads = train(lessons, STEPS)
    assert 0 < result.steps <= STEPS
    assert result.held_out_after < 0.97 * result.held_out_before
    assert divergence(lessons, layers, heads) == pytest.approx(result.held_out_after, rel=1e-3)
    untouched, fresh_layers, fresh_heads = train(lessons, 0)
    assert untouched == LearnResult(0, result.held_out_before, result.held_out_before)
    assert divergence(lessons, fresh_layers, fresh_heads) == pytest.approx(result.held_out_before, rel=1e-3)


def test_distillation_is_deterministic(lessons: dict[str, Any]) -> None:
    first, second = (train(lessons, 3) for _ in range(2))
    assert first[0] == second[0]
    assert_same_leaves(first, second)


def assert_same_leaves(first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    for one, other in zip(leaves_of(*first[1:]), leaves_of(*second[1:]), strict=True):
        assert torch.equal(one, other)


def test_training_that_only_hurts_ends_early_where_it_began(
    lessons: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anequant.calibration.distill.LEARNING_RATE", 30.0)
    monkeypatch.setattr("anequant.calibration.distill.EVALUATE_EVERY", 1)
    taken: list[str] = []
    trained = train(lessons, 8, Progress(lambda parts, _: taken.append(parts[-1])))
    assert trained[0].steps == 0 and trained[0].held_out_after == trained[0].held_out_before
    assert len(taken) == PATIENCE
    assert_same_leaves(trained, train(lessons, 0))


def test_an_exact_model_is_left_alone(lessons: dict[str, Any]) -> None:
    """It is taught by itself: nothing is to be gained, whatever the optimizer makes of rounding noise."""
    quantized = lessons["quantized"]
    embedded = quantized.read("model.embed_tokens.weight").float()[lessons["tokens"]]
    taught = run_to_final_states(quantized, lessons["tokens"])
    own = {
        **lessons,
        "lesson": Lesson(embedded[3:], taught[3:]),
        "held_out": Lesson(embedded[:3], taught[:3]),
        "taught_head": quantized.read("lm_head.weight").float(),
    }
    trained = train(own, 2)
    assert trained[0].steps == 0 and abs(trained[0].held_out_after) < 1e-6
    assert_same_leaves(trained, train(own, 0))


# --- the whole pipeline -------------------------------------------------------------------------------


@pytest.fixture
def plain_and_tuned(tiny_qwen2: Path, quantize_model: Callable[..., Quantized]) -> tuple[Any, Any]:
    return quantize_model(tiny_qwen2, "w4-nearest"), quantize_model(tiny_qwen2, "w4-nearest", tune=16)


def test_a_tuned_checkpoint_keeps_its_codes(plain_and_tuned: tuple[Any, Any]) -> None:
    plain, tuned = plain_and_tuned
    assert plain.result.tuning is None
    before, after = (load_file(made.folder / "model.safetensors") for made in (plain, tuned))
    assert before.keys() == after.keys()
    assert {path.name for path in plain.folder.iterdir()} == {path.name for path in tuned.folder.iterdir()}
    moved = set()
    for name in plain.chosen:
        assert torch.equal(
            load(name, before.__getitem__, before).codes, load(name, after.__getitem__, after).codes
        )
        moved |= {
            suffix
            for suffix in ("codebook", "output_scales", "input_scales", "bias")
            if not torch.equal(before[f"{name}.{suffix}"], after[f"{name}.{suffix}"])
        }
    assert moved == {"codebook", "output_scales", "input_scales", "bias"}
    gains = [name for name in before if name.endswith("norm.weight")]
    assert len(gains) == 9 and not any(torch.equal(before[name], after[name]) for name in gains)
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[table], after[table])


@torch.no_grad()
def test_a_tuned_checkpoint_is_closer_to_the_float_model(
    tiny_qwen2: Path, plain_and_tuned: tuple[Any, Any]
) -> None:
    """As stock transformers reads it from disk, on a text that it was not trained on."""
    tokens = cut_windows(read_text(SAMPLE_TEXT), load_tokenizer(tiny_qwen2), 8189, count=12, length=64)

    def log_probabilities(folder: Path) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits.double().log_softmax(-1)

    log_p = log_probabilities(tiny_qwen2)
    plain, tuned = (
        float((log_p.exp() * (log_p - log_probabilities(made.folder))).sum(-1).mean())
        for made in plain_and_tuned
    )
    assert tuned < 0.97 * plain
    tuning = plain_and_tuned[1].result.tuning
    assert tuning.steps == 16 and tuning.held_out_after < 0.95 * tuning.held_out_before
