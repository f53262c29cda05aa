"""What it costs to round one tensor, in nats: the measure that mixed bits are chosen by.

For small errors E of a weight, KL(float || quantized) is half the quadratic form of the Fisher information,

    KL ~ 1/2 E_y [ <G, E>^2 ],   G = gradient of log p(y) for the weight,  y drawn from the float model,

summed over positions, whose draws are independent (Amari, "Natural gradient works efficiently", 1998,
section 2). One backward pass per window yields G for every tensor at once, so all tensors and all widths
are measured together. A window is one draw of a square, so many short windows tell more than few long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.architectures.spec import ModelSpec, layer_prefix
from anequant.calibration.surprise import differentiate_surprise
from anequant.jobs.control import Progress, silent
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.online import NOTHING, Online
from anequant.quantization.weight_format import WeightFormat
from anequant.reference.forward import ReferenceModel

Losses = dict[str, dict[int, float]]
"""KL per token by tensor name and bits."""


@dataclass(frozen=True)
class FloatModel:
    """The folded and rotated float model that costs are measured in.

    layer_tensors  the float32 tensors of a layer, by name relative to it
    head           float32 [vocab, hidden_size], with the final norm's gain
    online         the rotations that run
    """

    spec: ModelSpec
    layer_tensors: Callable[[int], Mapping[str, Tensor]]
    head: Tensor
    online: Online = NOTHING


def measure_rounding_losses(
    model: FloatModel,
    embedded: Tensor,
    formats: Sequence[WeightFormat],
    *,
    seed: int,
    progress: Progress = silent,
) -> Losses:
    """Measure the KL per token that rounding each projection to the nearest entries would cost, in each of
    `formats`, which differ in bits.

    embedded float32 [n, length, hidden_size] are the windows to measure on; `seed` draws the tokens.
    """
    spec = model.spec
    runner = ReferenceModel(spec, torch.float32, model.online)
    inputs = [embedded]
    for layer in range(spec.num_layers):
        progress(f"layer {layer + 1} forward", 0.3 * layer / spec.num_layers)
        inputs.append(runner.run_layer(layer, model.layer_tensors(layer), inputs[-1]))
    generator = torch.Generator().manual_seed(seed)
    gradient = differentiate_surprise(runner, inputs.pop(), model.head, generator)
    losses: Losses = {}
    for layer in reversed(range(spec.num_layers)):
        progress(f"layer {layer + 1} backward", 1 - 0.7 * layer / spec.num_layers)
        tensors, hidden = model.layer_tensors(layer), inputs.pop()
        errors = {
            (linear.name, format_.bits): _error(tensors[f"{linear.name}.weight"], format_, linear.name)
            for linear in spec.architecture.linears
            for format_ in formats
        }
        squares = dict.fromkeys(errors, 0.0)
        for window in range(len(hidden)):
            one = slice(window, window + 1)
            gradient[one], gradients = runner.gradients(layer, tensors, hidden[one], gradient[one])
            for (name, bits), error in errors.items():
                squares[name, bits] += float((gradients[f"{name}.weight"] * error).sum()) ** 2
        for (name, bits), square in squares.items():
            by_width = losses.setdefault(layer_prefix(layer) + name, {})
            by_width[bits] = square / 2 / hidden[..., 0].numel()
    return losses


def _error(weight: Tensor, format_: WeightFormat, name: str) -> Tensor:
    return quantize_linear(weight, None, format_, name).dequantize() - weight
