"""Scales that a recipe takes from the inputs of a layer's linears: static scales of activations, and the
input scale that SmoothQuant shares between weight and activations.

Inputs come a few windows at a time and are not kept. `prefix` positions of every window stay in float when
the model runs, so they do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from anequant.architectures.spec import INPUT_SCALES, Linear, Space, layer_prefix
from anequant.quantization.activations import BINS, choose_static_scale
from anequant.quantization.online import Online
from anequant.quantization.scales import balance_scales
from anequant.recipe import Recipe

Inputs = Callable[[], Iterable[Tensor]]
"""Inputs [n, length, in] of some linears, some windows at a time; may be asked for repeatedly."""


def choose_input_scale(recipe: Recipe, linear: Linear, weight: Tensor, inputs: Inputs) -> Tensor | None:
    """Return the input scale [in] that SmoothQuant gives weight [out, in] if it reads the SwiGLU product;
    None if it does not, or without `smooth`."""
    if not recipe.smooth or linear.input.space is not Space.FFN:
        return None
    magnitudes = find_largest_magnitudes(inputs(), recipe.activation_prefix)
    return smooth_scale(balance_scales(weight)[1], magnitudes, recipe.smooth)


def measure_static_scales(
    recipe: Recipe,
    online: Online,
    layer: int,
    group: Sequence[Linear],
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
) -> dict[str, float]:
    """Measure the static scales of the inputs of a group of linears, by full name; none where activations
    have none.

    tensors are the layer's, with the input scales [1, in] of linears that have them.
    """
    if not recipe.static_activations:
        return {}
    prefix = layer_prefix(layer)
    formats = {linear.name: online.activations.get(prefix + linear.name) for linear in group}
    widths = {name: format_.bits for name, format_ in formats.items() if format_ is not None}
    scales = _static_scales(tensors, inputs, widths, recipe.activation_range, recipe.activation_prefix)
    return {prefix + name: scale for name, scale in scales.items()}


def find_largest_magnitudes(inputs: Iterable[Tensor], prefix: int) -> Tensor:
    """Return the largest |x| of every channel: float32 [in]."""
    return torch.stack([part[:, prefix:].abs().amax((0, 1)) for part in inputs]).amax(0)


def _static_scales(
    tensors: Mapping[str, Tensor], inputs: Inputs, widths: Mapping[str, int], kind: str, prefix: int
) -> dict[str, float]:
    """Return the static scale of each linear in `widths` (bits), by name relative to the layer; all read
    `inputs`.

    tensors are the layer's, with the input scales [1, in] of linears that have them.
    """
    if not widths:
        return {}
    factors = {name: tensors.get(f"{name}.{INPUT_SCALES}", torch.ones(1)) for name in widths}
    channels = find_largest_magnitudes(inputs(), prefix)
    largest = {name: float((channels * factor).max()) for name, factor in factors.items()}
    counts = {name: torch.zeros(BINS) for name in widths}
    for part in inputs() if kind != "absmax" else ():
        later = part[:, prefix:].abs()
        for name, factor in factors.items():
            counts[name] += torch.histc(later * factor, BINS, 0, largest[name] or 1.0)
    return {
        name: choose_static_scale(counts[name], largest[name], bits, kind) for name, bits in widths.items()
    }


def smooth_scale(balanced: Tensor, magnitudes: Tensor, strength: float) -> Tensor:
    """Return an input scale [in] between what weight and activations want, as float16 holds it.

    SmoothQuant (Xiao et al. 2023, equation 4) divides activations by s_j = max|X_j|^a / max|W_j|^(1-a). Here
    the input scale multiplies them, and what the weight wants is `balanced` [in]: balanced^(1-a) / max|X|^a,
    with a geometric mean of one.
    """
    floor = float(magnitudes.max()) * 1e-6 or 1.0
    wanted = (1 - strength) * balanced.log() - strength * magnitudes.clamp_min(floor).log()
    return (wanted - wanted.mean()).clamp(-5.0, 5.0).exp().half().float()
