"""Learned, picked and PCA rotations, against whole models in autograd, brute force and trained weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from anequant.calibration import learn_rotations as learning
from anequant.calibration.rotated_student import Lesson, RotatedStudent
from anequant.calibration.rotation_choice import choose_rotations
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT, Source
from anequant.errors import UsageError
from anequant.evaluation.divergence import measure_quality
from anequant.jobs.control import silent
from anequant.pipeline.quantize import quantize
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.online import plan_online
from anequant.quantization.weight_format import WeightFormat
from anequant.recipe import Recipe
from anequant.recipe_files import load_recipe
from anequant.reference.forward import run_to_final_states
from anequant.reference.sources import read_text
from anequant.reference.windows import cut_windows, load_tokenizer
from anequant.request import Request
from anequant.rotation.cayley import cayley_step
from anequant.rotation.orthogonal import draw_hadamard, draw_random_rotation
from anequant.rotation.rotation_plan import RotationPlan, plan_rotations

W4A4 = {"activation_bits": 4, "r4": "block-hadamard"}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def off_orthogonal(matrix: Tensor) -> float:
    return float((matrix.T @ matrix - torch.eye(len(matrix), dtype=torch.float64)).abs().max())


@pytest.fixture(scope="module")
def windows(tiny_qwen2: Path) -> Tensor:
    tokenizer = load_tokenizer(tiny_qwen2)
    return cut_windows(read_text(SAMPLE_TEXT), tokenizer, tokenizer.eos_token_id, count=12, length=48)


@pytest.fixture(scope="module")
def tiny(tiny_qwen2: Path) -> Checkpoint:
    return open_checkpoint(tiny_qwen2)


def lesson_of(checkpoint: Checkpoint, tokens: Tensor) -> Lesson:
    embedding = checkpoint.read("model.embed_tokens.weight").float()
    return Lesson(embedding[tokens], run_to_final_states(checkpoint, tokens))


def student_of(checkpoint: Checkpoint, recipe: Recipe) -> RotatedStudent:
    return RotatedStudent(checkpoint, recipe, plan_online(checkpoint.spec, recipe))


def test_a_cayley_step_descends_and_stays_orthogonal() -> None:
    """Towards the rotation Q that a linear loss -<Q, X> has its least value at."""
    x, target = torch.eye(12, dtype=torch.float64), draw_random_rotation(12, seeded(0)).dense()
    target = target if torch.linalg.det(target) > 0 else target[:, [1, 0, *range(2, 12)]]
    momentum, losses = torch.zeros_like(x), []
    for _ in range(300):
        losses.append(-float((target * x).sum()))
        x, momentum = cayley_step(x, -target, momentum, 0.1, 0.5)
        assert off_orthogonal(x) <= 1e-12
    assert losses[1] < losses[0]
    assert float((x - target).abs().max()) < 1e-4


def reference_gradients(
    folder: Path, tokens: Tensor, matrices: dict[str, Tensor], bits: int
) -> tuple[float, dict[str, Tensor]]:
    """The same by autograd through transformers' whole model in float64, weights turned by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    theirs = model(tokens, use_cache=False).logits.log_softmax(-1).detach()
    leaves = {name: matrix.clone().requires_grad_() for name, matrix in matrices.items()}
    r1 = leaves["r1"]
    state = {name: value.detach() for name, value in model.named_parameters()}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ r1
    state["lm_head.weight"] = (state["lm_head.weight"] * state["model.norm.weight"]) @ r1
    state["model.norm.weight"] = torch.ones_like(state["model.norm.weight"])
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        r2 = leaves[f"r2.{layer}"]
        values, queries = torch.block_diag(r2, r2), torch.block_diag(r2, r2, r2, r2)
        for norm, names in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for name in names:
                state[f"{prefix}{name}.weight"] = (
                    state[f"{prefix}{name}.weight"] * state[f"{prefix}{norm}.weight"]
                ) @ r1
            state[f"{prefix}{norm}.weight"] = torch.ones_like(state[f"{prefix}{norm}.weight"])
        value, attended, down = (
            f"{prefix}{name}" for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
        )
        state[f"{value}.weight"] = values.T @ state[f"{value}.weight"]
        state[f"{value}.bias"] = state[f"{value}.bias"] @ values
        state[f"{attended}.weight"] = r1.T @ state[f"{attended}.weight"] @ queries
        state[f"{down}.weight"] = r1.T @ state[f"{down}.weight"]
    if bits < 16:
        for name, value in list(state.items()):
            if name.endswith("_proj.weight"):
                rounded = quantize_linear(
                    value.detach().float(), None, WeightFormat(bits, "lut", "balanced"), name
                ).dequantize()
                state[name] = value + (rounded.double() - value).detach()
    logits = torch.func.functional_call(model, state, (tokens,), {"use_cache": False}).logits
    ours = logits.log_softmax(-1)
    loss = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    found = torch.autograd.grad(loss, [*leaves.values()])
    return float(loss.detach()), dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize(("bits", "online"), [(16, {"r3": "hadamard", "r4": "block-hadamard"}), (4, {})])
def test_gradients_of_rotations_are_autograds(
    make_model: Callable[..., Path], tmp_path: Path, bits: int, online: dict[str, Any]
) -> None:
    """At matrices that are not orthogonal, where the float model has a gradient too. R3 and R4 cancel."""
    folder = make_model(tmp_path / "model", "qwen2", False, num_hidden_layers=2)
    checkpoint = open_checkpoint(folder)
    tokens = torch.randint(97, (2, 10), generator=seeded(1))
    recipe = load_recipe("w4-nearest", {"r1": "random", "bits": bits, **online})
    plan = plan_rotations(checkpoint.spec, recipe)
    generator = seeded(2)
    matrices = {
        name: matrix + 0.02 * torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
        for name, matrix in plan.matrices().items()
    }
    assert set(matrices) == {"r1", "r2.0", "r2.1"}
    student, lesson = student_of(checkpoint, recipe), lesson_of(checkpoint, tokens)
    divergence, gradients = student.gradients(plan.with_matrices(matrices), lesson)
    expected, references = reference_gradients(folder, tokens, matrices, bits)
    assert divergence == pytest.approx(expected, rel=1e-3)
    assert student.divergence(plan.with_matrices(matrices), lesson) == pytest.approx(expected, rel=1e-3)
    assert gradients.keys() == references.keys()
    for name, reference in references.items():
        assert float((gradients[name] - reference).norm()) <= 2e-3 * float(reference.norm()), name


def test_the_float_model_does_not_change_with_rotations(tiny: Checkpoint, windows: Tensor) -> None:
    recipe = load_recipe("w4-nearest", {"bits": 16, "r1": "random"})
    lesson = lesson_of(tiny, windows[:2])
    assert student_of(tiny, recipe).divergence(plan_rotations(tiny.spec, recipe), lesson) < 1e-5


def test_the_students_divergence_is_that_of_the_written_checkpoint(
    tiny_qwen2: Path, tiny: Checkpoint, windows: Tensor, tmp_path: Path
) -> None:
    """Float16 storage, and the last position, make the difference."""
    recipe = load_recipe("w4-nearest", W4A4)
    quantize(Request(Source(tiny_qwen2, "tiny"), recipe), tmp_path / "out")
    written = measure_quality(open_checkpoint(tmp_path / "out"), windows[:4], tiny).kl
    assert written is not None and written > 0.01
    ours = student_of(tiny, recipe).divergence(
        plan_rotations(tiny.spec, recipe), lesson_of(tiny, windows[:4])
    )
    assert ours == pytest.approx(written, rel=0.1)


def test_learned_rotations_are_orthogonal_and_better(
    tiny: Checkpoint, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "EVALUATE_EVERY", 4)
    recipe = load_recipe("w4-nearest", {**W4A4, "learn": 16})
    chosen = choose_rotations(tiny, recipe, windows, None, silent)
    assert chosen.choice is not None and chosen.matrices is not None
    learned = chosen.choice.learned
    assert learned is not None and learned.steps in (4, 8, 12, 16)
    assert learned.held_out_after < 0.99 * learned.held_out_before
    start = plan_rotations(tiny.spec, recipe).matrices()
    assert chosen.matrices.keys() == start.keys()
    for name, matrix in chosen.matrices.items():
        assert off_orthogonal(matrix) <= 1e-6
        assert float((matrix - start[name]).abs().max()) > 1e-4, f"{name} has not moved"
    student, measured = student_of(tiny, recipe), lesson_of(tiny, windows[:6])
    assert student.divergence(chosen.plan, measured) == pytest.approx(learned.held_out_after, rel=1e-3)
    before = student.divergence(plan_rotations(tiny.spec, recipe).dense(), measured)
    assert before == pytest.approx(learned.held_out_before, rel=1e-3)


def test_learning_is_reproducible(tiny: Checkpoint, windows: Tensor) -> None:
    recipe = load_recipe("w4-nearest", {"activation_bits": 4, "learn": 2})
    once, again = (choose_rotations(tiny, recipe, windows[:4], None, silent).matrices for _ in range(2))
    assert once is not None and again is not None
    assert all(torch.equal(again[name], matrix) for name, matrix in once.items())


def test_restarts_pick_the_least_divergence(tiny: Checkpoint, windows: Tensor) -> None:
    recipe = load_recipe("w4-nearest", {**W4A4, "restarts": 3, "seed": 5})
    chosen = choose_rotations(tiny, recipe, windows[:4], None, silent)
    student, measured = student_of(tiny, recipe), lesson_of(tiny, windows[:2])
    plans: dict[int, RotationPlan] = {
        seed: plan_rotations(tiny.spec, replace(recipe, seed=seed)) for seed in (5, 6, 7)
    }
    losses = {seed: student.divergence(plan, measured) for seed, plan in plans.items()}
    best = min(losses, key=losses.__getitem__)
    assert len(set(losses.values())) == 3
    assert chosen.choice is not None and chosen.matrices is not None
    assert chosen.choice.seed == best
    assert chosen.choice.restarts == pytest.approx(losses, rel=1e-3)
    for name, matrix in plans[best].matrices().items():
        assert torch.equal(chosen.matrices[name], matrix)


def test_restarts_need_a_seed(tiny: Checkpoint) -> None:
    with pytest.raises(UsageError, match="restarts"):
        choose_rotations(
            tiny, load_recipe(None, {"r1": "none", "r2": "none", "restarts": 2}), None, None, silent
        )


def test_pca_diagonalises_the_second_moment(tiny_qwen2: Path, tiny: Checkpoint, windows: Tensor) -> None:
    """The stream as transformers' norms meet it; R1 is its eigenbasis, then a random Hadamard matrix."""
    recipe = load_recipe("w4-nearest", {"r1": "pca", "seed": 3})
    chosen = choose_rotations(tiny, recipe, windows[:4], None, silent)
    assert chosen.plan.r1 is not None and chosen.matrices is not None
    r1 = chosen.plan.r1.dense()
    assert off_orthogonal(r1) <= 1e-10

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float64).eval()
    seen: list[Tensor] = []
    norms = [layer.input_layernorm for layer in model.model.layers] + [model.model.norm]
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, 1)))
    with torch.no_grad():
        model(windows[:4], use_cache=False)
    rows = torch.cat(seen)
    rows = rows / rows.square().mean(-1, keepdim=True).add(tiny.spec.rms_norm_eps).sqrt()
    moment = rows.T @ rows / len(rows)

    width = tiny.spec.hidden_size
    basis = r1 @ draw_hadamard(width, seeded(3)).dense().T
    diagonal = basis.T @ moment @ basis
    off = diagonal - diagonal.diagonal().diag()
    assert float(off.abs().max()) <= 1e-4 * float(diagonal.diagonal().max())
    turned = r1.T @ moment @ r1
    assert float(turned.diagonal().max()) < 0.5 * float(moment.diagonal().max()), "the Hadamard spreads it"
