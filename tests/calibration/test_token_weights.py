"""Token weights against autograd through whole transformers models, and what they do not depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from anequant.architectures.spec import layer_prefix
from anequant.calibration import surprise
from anequant.calibration import token_weights as module
from anequant.calibration.token_weights import couplings_file, measure_token_weights, read_couplings
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.errors import InputError
from anequant.quantization.kernels import TILE
from anequant.quantization.online import plan_online
from anequant.recipe_files import load_recipe
from anequant.reference.forward import ReferenceModel
from anequant.reference.rotated_model import RotatedModel
from anequant.rotation.rotation_plan import RotationPlan, plan_rotations

WINDOWS, LENGTH, DRAWN = 6, 12, 5


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bfloat16", lambda: False)


def unrotated(checkpoint: Checkpoint) -> RotatedModel:
    return RotatedModel(checkpoint, RotationPlan(), fold_scales=False)


def draw_one(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.full((len(logits),), DRAWN)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.usefixtures("exact")
def test_weights_are_roots_of_squared_gradients(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Of the loss of one token that is always drawn; more windows than run at once. Couplings are squares of
    the same gradients."""
    monkeypatch.setattr(surprise, "draw_tokens", draw_one)
    folder = make_model(tmp_path / "model", model_type, False)
    checkpoint = open_checkpoint(folder)
    tokens = torch.randint(97, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
        return lambda module, arguments, output: outputs.__setitem__(name, output)

    names = [
        layer_prefix(layer) + linear.name
        for layer in range(checkpoint.spec.num_layers)
        for linear in checkpoint.spec.architecture.linears
    ]
    for name in names:
        whole.get_submodule(name).register_forward_hook(keep(name))
    loss = -whole(tokens, use_cache=False).logits.log_softmax(-1)[..., DRAWN].sum()
    gradients = torch.autograd.grad(loss, [outputs[name] for name in names])

    weights = measure_token_weights(unrotated(checkpoint), tokens, 0, tmp_path)
    assert weights.keys() == set(names)
    for name, gradient in zip(names, gradients, strict=True):
        root = gradient.square().mean(-1).sqrt()
        torch.testing.assert_close(weights[name].double(), root / root.mean(), rtol=1e-3, atol=1e-4)
    found = {
        layer_prefix(layer) + name: tiles
        for layer in range(checkpoint.spec.num_layers)
        for name, tiles in read_couplings(tmp_path, layer).items()
    }
    assert found.keys() == set(names)
    for name, gradient in zip(names, gradients, strict=True):
        rows = gradient.flatten(0, 1)
        square = (rows / rows.norm(dim=1, keepdim=True)).T @ rows
        expected = (square / square.diagonal().mean() + torch.eye(len(square))) / 2
        (tile,) = found[name].double()
        torch.testing.assert_close(tile[: len(square), : len(square)], expected, rtol=1e-3, atol=1e-3)


def test_couplings_are_kept_in_tiles() -> None:
    """The last tile is filled up with zeros, which do not count."""
    rows = torch.randn(40, TILE + 3, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(2, TILE, TILE)
    module._add_squares(total, rows)
    square = rows.T @ rows
    torch.testing.assert_close(total[0], square[:TILE, :TILE])
    torch.testing.assert_close(total[1, :3, :3], square[TILE:, TILE:])
    coupling = module._couple(total)
    diagonal = coupling.diagonal(dim1=1, dim2=2).flatten()
    assert float(diagonal[: TILE + 3].mean()) == pytest.approx(1)
    assert diagonal[TILE + 3 :].tolist() == [0.5] * (TILE - 3)
    assert torch.equal(module._couple(torch.zeros(2, TILE, TILE)), torch.eye(TILE).expand(2, -1, -1) / 2)


@pytest.mark.usefixtures("exact")
def test_a_rotated_model_has_the_same_weights(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of gradients do not change where outputs are rotated, nor where R3 and R4 run. No state stays."""
    monkeypatch.setattr(surprise, "draw_tokens", draw_one)
    checkpoint = open_checkpoint(make_model(tmp_path / "model", "qwen2", False))
    recipe = load_recipe(None, {"r1": "random", "r3": "hadamard", "r4": "hadamard", "activation_bits": 8})
    plan, online = plan_rotations(checkpoint.spec, recipe), plan_online(checkpoint.spec, recipe)
    rotated = RotatedModel(checkpoint, plan, fold_scales=False, online=online)
    tokens = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    (tmp_path / "scratch").mkdir()
    one, other = (
        measure_token_weights(model, tokens, 0, tmp_path / "scratch")
        for model in (unrotated(checkpoint), rotated)
    )
    for name, weights in one.items():
        torch.testing.assert_close(other[name], weights, rtol=2e-3, atol=2e-4)
    kept = {couplings_file(tmp_path / "scratch", layer) for layer in range(checkpoint.spec.num_layers)}
    assert set((tmp_path / "scratch").iterdir()) == kept


def test_weights_are_about_one_and_told_by_the_seed(tiny_qwen2: Path, tmp_path: Path) -> None:
    model = unrotated(open_checkpoint(tiny_qwen2))
    tokens = torch.randint(8000, (3, 32), generator=torch.Generator().manual_seed(1))
    first, again, other = (measure_token_weights(model, tokens, seed, tmp_path) for seed in (0, 0, 1))
    for name, weights in first.items():
        assert weights.shape == tokens.shape and bool((weights >= 0).all())
        assert float(weights.mean()) == pytest.approx(1, rel=1e-5)
        assert torch.equal(weights, again[name])
    assert any(not torch.equal(weights, other[name]) for name, weights in first.items())


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """By Pearson's chi-squared, whose 99.99th percentile at 7 degrees of freedom is 29.9."""
    p = torch.tensor([0.02, 0.3, 0.0, 0.08, 0.25, 0.05, 0.2, 0.1]).expand(40_000, -1)
    drawn = surprise.draw_tokens(p.log(), torch.Generator().manual_seed(0))
    assert drawn is not None
    counts = torch.bincount(drawn, minlength=8).double()
    assert counts[2] == 0
    expected = p[0].double() * len(p)
    kept = expected > 0
    assert float(((counts - expected)[kept].square() / expected[kept]).sum()) < 29.9


def test_logits_that_are_not_finite_are_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    model = unrotated(open_checkpoint(tiny_qwen2))
    runner = ReferenceModel(model.spec, torch.float32)
    hidden = torch.ones(1, 2, model.spec.hidden_size)
    head = torch.full((3, model.spec.hidden_size), torch.inf)
    with pytest.raises(InputError, match="logits are not finite on the calibration tokens"):
        surprise.differentiate_surprise(runner, hidden, head, torch.Generator())
