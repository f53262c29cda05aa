"""Scales that a recipe takes from the inputs of linears, while these walk by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from anequant.architectures.spec import Linear, Space, layer_prefix
from anequant.calibration.activation_scales import Inputs, largest_magnitudes, smoothed_scale, static_scales
from anequant.quantization.online import Online
from anequant.quantization.scales import balanced_scales
from anequant.recipe import Recipe


def smoothed(recipe: Recipe, linear: Linear, weight: Tensor, inputs: Inputs) -> Tensor | None:
    """The input scale [in] that SmoothQuant gives weight [out, in] if it reads the SwiGLU product; else None,
    as without `smooth`."""
    if not recipe.smooth or linear.input.space is not Space.FFN:
        return None
    magnitudes = largest_magnitudes(inputs(), recipe.activation_prefix)
    return smoothed_scale(balanced_scales(weight)[1], magnitudes, recipe.smooth)


def measured(
    recipe: Recipe,
    online: Online,
    layer: int,
    group: Sequence[Linear],
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
) -> dict[str, float]:
    """Static scales of the inputs of a group of linears, by full name; none where activations have none.

    tensors are the layer's, with the input scales of linears that have them.
    """
    if not recipe.static_activations:
        return {}
    prefix = layer_prefix(layer)
    formats = {linear.name: online.activations.get(prefix + linear.name) for linear in group}
    widths = {name: format_.bits for name, format_ in formats.items() if format_ is not None}
    scales = static_scales(tensors, inputs, widths, recipe.activation_range, recipe.activation_prefix)
    return {prefix + name: scale for name, scale in scales.items()}
