"""Predicted costs against the real ones: one tensor of stock transformers' model rounded at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from anequant.calibration.sensitivity import FloatModel, Losses, measure_rounding_losses
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.weight_format import WeightFormat
from anequant.reference.sources import read_text
from anequant.reference.windows import cut_windows, load_tokenizer

WIDTHS = (3, 4, 8)
MEASURED = (3, 4)


@pytest.fixture(scope="module")
def tokens(tiny_qwen2: Path) -> Tensor:
    return cut_windows(read_text(SAMPLE_TEXT), load_tokenizer(tiny_qwen2), 8189, count=48, length=32)


@pytest.fixture(scope="module")
def predicted(tiny_qwen2: Path, tokens: Tensor) -> Losses:
    checkpoint = open_checkpoint(tiny_qwen2)

    def layer(number: int) -> dict[str, Tensor]:
        return {name: value.float() for name, value in checkpoint.layer(number).items()}

    head = checkpoint.read(checkpoint.head_name).float() * checkpoint.final_gain().float()
    return measure_rounding_losses(
        FloatModel(checkpoint.spec, layer, head),
        checkpoint.read("model.embed_tokens.weight").float()[tokens],
        [WeightFormat(bits, "lut", "balanced") for bits in WIDTHS],
        seed=0,
    )


@torch.no_grad()
def real_losses(checkpoint: Checkpoint, tokens: Tensor, names: list[str], bits: int) -> dict[str, float]:
    """KL per token with each tensor in turn rounded: cross entropy over entropy, in float64."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()

    def logits() -> Tensor:
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits.flatten(0, 1).double()

    chances = logits().softmax(-1)
    entropy = cross_entropy(logits(), chances)
    losses = {}
    for name in names:
        parameter = model.get_parameter(f"{name}.weight")
        weight = parameter.data
        rounded = quantize_linear(weight, None, WeightFormat(bits, "lut", "balanced"), name)
        parameter.data = rounded.dequantize()
        losses[name] = float(cross_entropy(logits(), chances) - entropy)
        parameter.data = weight
    return losses


@pytest.mark.parametrize("bits", MEASURED)
def test_predictions_follow_the_real_cost(
    tiny_qwen2: Path, tokens: Tensor, predicted: Losses, bits: int
) -> None:
    """Real costs vary little between windows, so every other one is enough for them."""
    real = real_losses(open_checkpoint(tiny_qwen2), tokens[::2], list(predicted), bits)
    assert len(real) == 28
    ours = torch.tensor([predicted[name][bits] for name in real]).log()
    theirs = torch.tensor(list(real.values())).log()
    assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.93
    ranks = torch.stack([values.argsort().argsort().double() for values in (ours, theirs)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9
    assert float((ours - theirs).abs().max()) < 1.0
    assert abs(float((ours - theirs).mean())) < 0.2


def test_more_bits_cost_less(predicted: Losses) -> None:
    for losses in predicted.values():
        assert losses[3] > losses[4] > 20 * losses[8] > 0
    totals = [sum(losses[bits] for losses in predicted.values()) for bits in WIDTHS]
    assert totals[0] > 3 * totals[1] > 300 * totals[2]
