"""Predicted costs against the real ones: one tensor of stock transformers' model rounded at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from running import succeed
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from anequant.architectures.spec import EMBEDDING, HEAD
from anequant.calibration.sensitivity import FloatModel, Formats, Losses, measure_rounding_losses
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.quantization.nearest import fit_core, quantize_linear
from anequant.quantization.weight_format import WeightFormat
from anequant.reference.sources import read_text
from anequant.reference.windows import cut_windows, load_tokenizer

WIDTHS = (3, 4, 8)
MEASURED = (4, 8)


@pytest.fixture(scope="module")
def tokens(tiny_qwen2: Path) -> Tensor:
    return cut_windows(read_text(SAMPLE_TEXT), load_tokenizer(tiny_qwen2), 8189, count=48, length=32)


def round_to_nearest(weight: Tensor, format_: WeightFormat, inputs: Tensor) -> Tensor:
    return quantize_linear(weight, None, format_, "a weight").dequantize()


def round_with_feedback(weight: Tensor, format_: WeightFormat, inputs: Tensor) -> Tensor:
    """GPTQ as its paper has it, a column after the other, for inputs [tokens, in]; columns go from last to
    first as they are."""
    fitted = fit_core(weight, format_, "a weight")
    hessian = inputs.T @ inputs
    hessian.diagonal().add_(0.2 * hessian.diagonal().mean())
    lower = torch.linalg.cholesky(hessian)
    error = torch.zeros_like(weight)
    for column in reversed(range(weight.shape[1])):
        wanted = weight[:, column] + error @ lower[:, column] / lower[column, column]
        core = wanted / (fitted.output_scale * fitted.input_scale[column])
        nearest = (core[:, None] - fitted.codebook).abs().argmin(1)
        rounded = fitted.codebook[nearest] * fitted.output_scale * fitted.input_scale[column]
        error[:, column] = weight[:, column] - rounded
    return weight - error


ROUNDINGS: dict[str, Callable[[Tensor, WeightFormat, Tensor], Tensor]] = {
    "nearest": round_to_nearest,
    "feedback": round_with_feedback,
}


@pytest.fixture(scope="module", params=ROUNDINGS)
def rounding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def rotated(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Weights as the product rounds them: rotation spreads outliers, so that all entries err alike."""
    output = tmp_path_factory.mktemp("rotated") / "model"
    succeed("rotate", tiny_qwen2, "-o", output)
    return open_checkpoint(output)


@pytest.fixture(scope="module")
def predicted(rotated: Checkpoint, tokens: Tensor, rounding: str) -> Losses:
    checkpoint = rotated

    def layer(number: int) -> dict[str, Tensor]:
        return {name: value.float() for name, value in checkpoint.layer(number).items()}

    head = checkpoint.read(checkpoint.head_name).float() * checkpoint.final_gain().float()
    embedding = checkpoint.read("model.embed_tokens.weight").float()
    tables = [WeightFormat(bits, "lut", "output") for bits in WIDTHS]
    return measure_rounding_losses(
        FloatModel(checkpoint.spec, layer, head, lambda ids: embedding[ids], lambda: embedding),
        tokens,
        Formats(
            [WeightFormat(bits, "lut", "balanced") for bits in WIDTHS],
            {EMBEDDING: tables, HEAD: tables},
            rounding == "feedback",
        ),
        seed=0,
    )


@torch.no_grad()
def real_losses(checkpoint: Checkpoint, tokens: Tensor, names: list[str], rounding: str) -> Losses:
    """KL per token with each tensor in turn rounded in stock transformers' model, embedding and head apart:
    cross entropy over entropy, in float64."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * model.model.norm.weight)
    model.model.norm.weight.fill_(1)
    inputs: dict[str, Tensor] = {}

    def keep(name: str, module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.setdefault(name, arguments[0].flatten(0, 1))

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(partial(keep, name))

    def logits() -> Tensor:
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits.flatten(0, 1).double()

    chances = logits().softmax(-1)
    entropy = cross_entropy(logits(), chances)
    losses: Losses = {name: {} for name in names}
    for name in names:
        parameter = model.get_parameter(f"{name}.weight")
        weight = parameter.data
        scales, how = ("balanced", rounding) if "_proj" in name else ("output", rounding)
        if name == EMBEDDING:
            how = "nearest"
        for bits in MEASURED:
            format_ = WeightFormat(bits, "lut", scales)
            parameter.data = ROUNDINGS[how](weight, format_, inputs[name])
            losses[name][bits] = float(cross_entropy(logits(), chances) - entropy)
        parameter.data = weight
    return losses


def test_predictions_follow_the_real_cost(
    rotated: Checkpoint, tokens: Tensor, predicted: Losses, rounding: str
) -> None:
    """Real costs vary little between windows, so every other one is enough for them."""
    real = real_losses(rotated, tokens[::2], list(predicted), rounding)
    assert len(real) == 30
    for bits in MEASURED:
        ours = torch.tensor([predicted[name][bits] for name in real]).log()
        theirs = torch.tensor([losses[bits] for losses in real.values()]).log()
        assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.97
        ranks = torch.stack([values.argsort().argsort().double() for values in (ours, theirs)])
        assert float(torch.corrcoef(ranks)[0, 1]) > 0.95
        assert float((ours - theirs).abs().max()) < 0.8
        assert abs(float((ours - theirs).mean())) < 0.15


def test_more_bits_cost_less(predicted: Losses) -> None:
    for losses in predicted.values():
        assert losses[3] > losses[4] > 20 * losses[8] > 0
    totals = [sum(losses[bits] for losses in predicted.values()) for bits in WIDTHS]
    assert totals[0] > 3 * totals[1] > 300 * totals[2]
