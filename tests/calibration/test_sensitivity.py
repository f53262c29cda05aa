"""Predicted costs against the real ones: one tensor rounded at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from anequant.architectures.spec import layer_prefix
from anequant.calibration.forward import ReferenceModel
from anequant.calibration.sensitivity import Losses, rounding_losses
from anequant.calibration.text import load_tokenizer, read_text, text_windows
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.quantization.quantize import quantize_linear

BITS = 3


def layer_of(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    return {name: value.float() for name, value in checkpoint.layer(layer).items()}


def run(checkpoint: Checkpoint, embedded: Tensor, head: Tensor, changed: dict[str, Tensor]) -> Tensor:
    """log p [n, length, vocab] in float64 with some tensors replaced, by full name."""
    model = ReferenceModel(checkpoint.spec, torch.float32)
    hidden = embedded
    for layer in range(checkpoint.spec.num_layers):
        tensors = layer_of(checkpoint, layer)
        prefix = layer_prefix(layer)
        tensors.update({n.removeprefix(prefix): v for n, v in changed.items() if n.startswith(prefix)})
        hidden = model.run_layer(layer, tensors, hidden)
    return (
        (model.final_norm(hidden, torch.ones(checkpoint.spec.hidden_size)) @ head.T).double().log_softmax(-1)
    )


@pytest.fixture(scope="module")
def measured(tiny_qwen2: Path) -> tuple[Losses, dict[str, float]]:
    """Predictions, and KL with each tensor in turn rounded to 3 bits."""
    checkpoint = open_checkpoint(tiny_qwen2)
    tokens = text_windows(read_text(SAMPLE_TEXT), load_tokenizer(tiny_qwen2), 8189, count=48, length=32)
    embedded = checkpoint.read("model.embed_tokens.weight").float()[tokens]
    head = checkpoint.read(checkpoint.head_name).float() * checkpoint.final_gain().float()
    predicted = rounding_losses(
        checkpoint.spec,
        lambda layer: layer_of(checkpoint, layer),
        head,
        embedded,
        widths=(BITS, 4, 8),
        codebook="lut",
        scales="balanced",
        seed=0,
    )
    base = run(checkpoint, embedded, head, {})
    real = {}
    for name in predicted:
        weight = checkpoint.read(f"{name}.weight").float()
        rounded = quantize_linear(weight, None, bits=BITS, codebook="lut", scales="balanced", name=name)
        log_q = run(checkpoint, embedded, head, {f"{name}.weight": rounded.dequantize()})
        real[name] = float((base.exp() * (base - log_q)).sum(-1).mean())
    return predicted, real


def test_predictions_follow_the_real_cost(measured: tuple[Losses, dict[str, float]]) -> None:
    predicted, real = measured
    assert len(real) == 28
    logs = torch.tensor([[predicted[name][BITS], real[name]] for name in real]).log()
    correlation = float(torch.corrcoef(logs.T)[0, 1])
    assert correlation > 0.9
    assert float((logs[:, 0] - logs[:, 1]).abs().max()) < 1.5
    assert abs(float((logs[:, 0] - logs[:, 1]).mean())) < 0.4


def test_more_bits_cost_less(measured: tuple[Losses, dict[str, float]]) -> None:
    predicted = measured[0].values()
    assert all(losses[BITS] > losses[4] > 20 * losses[8] > 0 for losses in predicted)
    totals = [sum(losses[bits] for losses in predicted) for bits in (BITS, 4, 8)]
    assert totals[0] > 3 * totals[1] > 300 * totals[2]
