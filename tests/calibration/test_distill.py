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
from anequant.calibration import distill as module
from anequant.calibration.distill import Budget, Course, TuneResult, distill, hold_out_windows
from anequant.calibration.student import Heads, Rates, Student, TunableLayer
from anequant.calibration.tuning_state import FILE, Tuned
from anequant.checkpoints.layers import load_layer, open_quantized
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.jobs.control import Progress, silent
from anequant.jobs.work_folder import DamagedWork
from anequant.quantization import products
from anequant.quantization.tunable_linear import start_tuning
from anequant.reference.forward import ReferenceModel, run_to_final_states
from anequant.reference.head_loss import differentiate_head, sum_head_loss
from anequant.reference.rotated_model import RotatedModel
from anequant.reference.sources import read_text
from anequant.reference.windows import cut_windows, load_tokenizer
from anequant.rotation.rotation_plan import RotationPlan

UNROTATED = {"r1": "none", "r2": "none"}


def start_layer(checkpoint: Checkpoint, original: Checkpoint, number: int) -> TunableLayer:
    """A layer in training, rounded without a rotation."""
    loaded = load_layer(checkpoint, number)
    floats = RotatedModel(original, RotationPlan(), fold_scales=False).float_layer(number)
    return TunableLayer(
        {name: start_tuning(linear, floats[f"{name}.weight"]) for name, linear in loaded.linears.items()},
        {name: gain.float().requires_grad_() for name, gain in loaded.gains.items()},
    )


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32, so that gradients can be compared with autograd's."""
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    monkeypatch.setattr(products, "has_slow_blas", lambda: False)


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
    """The first step of Adam moves every leaf by its rate against its gradient, which autograd finds through
    transformers' whole model; of windows that come in two parts."""
    folder = make_model(tmp_path / "model", model_type, False, num_hidden_layers=2)
    original = open_checkpoint(folder)
    quantized = open_quantized(quantize_model(folder, "w4-nearest", **UNROTATED).folder)
    tokens = torch.randint(97, (6, 12), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        log_p = model(tokens, use_cache=False).logits.log_softmax(-1)
    embedding, head = quantized.read("model.embed_tokens.weight"), quantized.read("lm_head.weight")
    heads = Heads(
        original.read(original.head_name).float(),
        head.float(),
        quantized.read("model.norm.weight").float().requires_grad_(),
    )
    layers = [start_layer(quantized, original, number) for number in range(2)]

    weights = {"model.embed_tokens.weight": embedding.double(), "lm_head.weight": head.double()}
    expected: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        prefix = layer_prefix(number)
        for name, linear in layer.linears.items():
            full = prefix + name
            own = {key: leaf.detach().double().requires_grad_() for key, leaf in linear.leaves.items()}
            latent = linear.latent.detach().double().requires_grad_()
            values = own["codebook"][linear.current().codes.long()] + latent - latent.detach()
            weights[f"{full}.weight"] = (
                own["log_output_scale"].exp()[:, None] * values * own["log_input_scale"].exp()
            )
            if f"{full}.bias" in dict(model.named_parameters()):
                weights[f"{full}.bias"] = own["bias"]
            expected |= {f"{number}.{name}.{key}": leaf for key, leaf in own.items()}
            expected[f"{number}.{name}.latent"] = latent
        for name, gain in layer.gains.items():
            weights[f"{prefix}{name}.weight"] = gain.detach().double().requires_grad_()
            expected[f"{number}.{name}.gain"] = weights[f"{prefix}{name}.weight"]
    weights["model.norm.weight"] = heads.gain.detach().double().requires_grad_()
    expected["2.gain"] = weights["model.norm.weight"]
    logits = torch.func.functional_call(model, weights, (tokens,), {"use_cache": False}).logits
    kl = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean()
    kl.backward()

    student = Student(quantized.spec, original, embedding, layers, heads)
    assert student.divergence(tokens) == pytest.approx(kl.item(), rel=1e-5)
    before = {
        f"{n}.{name}": leaf.detach().clone() for n, s in enumerate(student.leaves) for name, leaf in s.items()
    }
    rates = Rates(latent=1e-3, others=1e-4)
    student.learn(tokens, rates)
    for number, leaves in enumerate(student.leaves):
        for name, leaf in leaves.items():
            key = f"{number}.{name}"
            gradient = expected[key].grad
            rate = rates.latent if name.endswith(".latent") else rates.others
            assert leaf.grad is None
            if gradient is None:
                assert torch.equal(leaf, before[key])
                continue
            sure = gradient.abs() > 1e-3 * gradient.abs().max()
            step = (leaf.detach() - before[key])[sure]
            torch.testing.assert_close(step.double(), -rate * gradient[sure].sign(), rtol=0.01, atol=1e-7)


# --- distillation -------------------------------------------------------------------------------------

STEPS = 25


@pytest.fixture(scope="module")
def taught(tiny_qwen2: Path, quantize_model: Callable[..., Quantized]) -> dict[str, Any]:
    """The bundled model at 3 bits, and windows of the bundled text."""
    folder = quantize_model(tiny_qwen2, "w4-nearest", bits=3, **UNROTATED).folder
    tokenizer = load_tokenizer(tiny_qwen2)
    tokens = cut_windows(read_text(SAMPLE_TEXT), tokenizer, 8189, count=10, length=64)
    return {"original": open_checkpoint(tiny_qwen2), "quantized": open_quantized(folder), "tokens": tokens}


def train(
    taught: dict[str, Any], budget: Budget, folder: Path | None = None, progress: Progress = silent
) -> tuple[Tuned, TuneResult]:
    original, quantized, tokens = taught["original"], taught["quantized"], taught["tokens"]
    layers = [start_layer(quantized, original, number) for number in range(quantized.spec.num_layers)]
    heads = Heads(
        original.read(original.head_name).float(),
        quantized.read("lm_head.weight").float(),
        quantized.read("model.norm.weight").float().requires_grad_(),
    )
    embedding = quantized.read("model.embed_tokens.weight")
    student = Student(quantized.spec, original, embedding, layers, heads)
    return distill(student, Course(tokens[3:], tokens[:3], budget, seed=0), folder, progress)


def list_tensors(state: Tuned) -> list[Tensor]:
    found = [state.gain]
    for layer in state.layers:
        found += [*layer.gains.values()]
        for linear in layer.linears.values():
            found += [linear.codes, linear.codebook, linear.input_scale, linear.output_scale]
            found += [] if linear.bias is None else [linear.bias]
    return found


def assert_same(first: tuple[Tuned, TuneResult], second: tuple[Tuned, TuneResult]) -> None:
    assert first[1] == second[1]
    for one, other in zip(list_tensors(first[0]), list_tensors(second[0]), strict=True):
        assert torch.equal(one, other)


def divergence(taught: dict[str, Any], state: Tuned) -> float:
    """KL on the held-out windows from literal logits in float64."""
    original, quantized, tokens = taught["original"], taught["quantized"], taught["tokens"][:3]
    model = ReferenceModel(quantized.spec, torch.float32)
    hidden = quantized.read("model.embed_tokens.weight").float()[tokens]
    for number, layer in enumerate(state.layers):
        hidden = model.run_layer(number, layer.tensors(), hidden)
    head = quantized.read("lm_head.weight").float()
    ours = (model.final_norm(hidden, state.gain) @ head.T).double().log_softmax(-1)
    states = run_to_final_states(original, tokens)
    theirs = (states @ original.read(original.head_name).float().T).double().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_distillation_lowers_the_divergence_on_held_out_windows(
    taught: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In so few steps codes move where steps are large."""
    monkeypatch.setattr(module, "LATENT_RATE", 5e-3)
    state, result = train(taught, Budget(STEPS))
    assert result.steps == result.taken == STEPS and 0 < result.moved < 0.05
    assert result.held_out_after < 0.97 * result.held_out_before
    assert divergence(taught, state) == pytest.approx(result.held_out_after, rel=1e-3)


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 1), (6, 1), (18, 3), (96, 16), (2048, 16)])
def test_held_out_windows_are_evenly_spaced(count: int, expected: int) -> None:
    """Of a single one both are that one; else every window is in one of the two, in its order."""
    learned, judged = hold_out_windows(torch.arange(count)[:, None])
    assert len(judged) == expected
    if count > 1:
        assert sorted([*learned.flatten().tolist(), *judged.flatten().tolist()]) == list(range(count))
        gaps = judged.flatten().diff()
        assert len(gaps) == 0 or int(gaps.max() - gaps.min()) <= 1
    assert torch.equal(learned, learned.sort(0).values)


def test_distillation_is_deterministic(taught: dict[str, Any]) -> None:
    assert_same(train(taught, Budget(3)), train(taught, Budget(3)))


def test_a_stopped_distillation_goes_on_to_the_same_end(
    taught: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVALUATE_EVERY", 2)
    whole = train(taught, Budget(5))

    def stop(parts: tuple[str, ...], _: float) -> None:
        if parts[-1].startswith("step 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(taught, Budget(5), tmp_path, Progress(stop))
    steps: list[str] = []
    resumed = train(taught, Budget(5), tmp_path, Progress(lambda parts, _: steps.append(parts[-1][:6])))
    assert steps == ["step 3", "step 4", "step 5"]
    assert_same(resumed, whole)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_damaged_state_is_refused(
    taught: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVALUATE_EVERY", 1)
    train(taught, Budget(2), tmp_path)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedWork, match=FILE.replace(".", "[.]")):
        train(taught, Budget(2), tmp_path)


def test_seconds_are_a_budget_too(taught: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that gains a second a look: one at the beginning, one at every step."""
    clock = iter(range(100))
    monkeypatch.setattr("anequant.calibration.distill.time.monotonic", lambda: float(next(clock)))
    assert train(taught, Budget(0, seconds=3.0))[1].taken == 3
    assert Budget(10).share(5, 1e9) == 0.5 and Budget(0, 60.0).share(10**9, 15.0) == 0.25


def test_training_that_only_hurts_ends_where_it_began(
    taught: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LATENT_RATE", 30.0)
    monkeypatch.setattr(module, "EVALUATE_EVERY", 1)
    state, result = train(taught, Budget(4))
    assert result.steps == 0 and result.taken == 4 and result.moved == 0
    assert result.held_out_after == result.held_out_before
    monkeypatch.setattr(module, "LATENT_RATE", 0.0)
    monkeypatch.setattr(module, "OTHER_RATE", 0.0)
    untouched, _ = train(taught, Budget(1))
    for one, other in zip(list_tensors(state), list_tensors(untouched), strict=True):
        assert torch.equal(one, other)


def test_an_exact_model_is_left_alone(taught: dict[str, Any]) -> None:
    """It is taught by itself: nothing is to be gained, whatever the optimizer makes of rounding noise."""
    own = {**taught, "original": taught["quantized"]}
    _, result = train(own, Budget(2))
    assert result.steps == 0 and abs(result.held_out_after) < 1e-6


# --- the whole pipeline -------------------------------------------------------------------------------


@pytest.fixture
def plain_and_tuned(tiny_qwen2: Path, quantize_model: Callable[..., Quantized]) -> tuple[Any, Any]:
    return quantize_model(tiny_qwen2, "w4-nearest"), quantize_model(tiny_qwen2, "w4-nearest", tune=16)


def test_a_tuned_checkpoint_differs_in_what_is_tuned(plain_and_tuned: tuple[Any, Any]) -> None:
    plain, tuned = plain_and_tuned
    assert plain.result.tuning is None
    before, after = (load_file(made.folder / "model.safetensors") for made in (plain, tuned))
    assert before.keys() == after.keys()
    assert {path.name for path in plain.folder.iterdir()} == {path.name for path in tuned.folder.iterdir()}
    moved, codes = set(), []
    for name in plain.chosen:
        one, other = (load(name, made.__getitem__, made).codes for made in (before, after))
        codes.append((one != other).flatten())
        moved |= {
            suffix
            for suffix in ("codebook", "output_scales", "input_scales", "bias")
            if not torch.equal(before[f"{name}.{suffix}"], after[f"{name}.{suffix}"])
        }
    tuning = tuned.result.tuning
    assert float(torch.cat(codes).double().mean()) == pytest.approx(tuning.moved, rel=1e-9)
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
