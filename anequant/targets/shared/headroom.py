"""Making a quantized model fit float16 and the Neural Engine's accumulator, exactly, before it is lowered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anequant.architectures.spec import ModelSpec, Space, layer_prefix
from anequant.calibration.ranges import LayerRange, find_power_of_two
from anequant.checkpoints.layers import QuantizedLayer
from anequant.errors import UnsupportedError
from anequant.quantization.linear import FloatTable, QuantizedLinear
from anequant.quantization.nearest import LARGEST_FLOAT16

LARGEST_SUM = 32768.0
MARGIN = 4.0
"""Other tokens than the measured ones may be this much louder before anything overflows."""

LARGEST_SHIFT = 0.25
"""The share of a token's attention that float16 may move: as where a score's last place is a whole unit, a
factor of e."""

NOTED_SHIFT = 0.02
"""The share that is worth naming: random models came out apart from 0.04 on, and none below 0.03."""


@dataclass(frozen=True)
class Headroom:
    """What lowering does about the measured ranges.

    residual_scale  the power of two on everything that writes to the residual stream
    sum_scales      by full name, the power of two that moves from a codebook to its output scales
    """

    ranges: tuple[LayerRange, ...]
    residual_scale: float
    sum_scales: Mapping[str, float]


def plan_headroom(ranges: Sequence[LayerRange]) -> Headroom:
    """Plan the scales; raises UnsupportedError naming the layer where float16 overflows in any case."""
    for layer in ranges:
        for what, value in (("q . k", layer.scores), ("a product", layer.products)):
            if value > LARGEST_FLOAT16:
                raise UnsupportedError(
                    f"{what} in layer {layer.layer} reaches {value:.3g}, float16 ends at 65504",
                    remedy="this model cannot run in float16",
                )
        if layer.attention > LARGEST_SHIFT:
            raise UnsupportedError(
                describe_moved_attention(layer.layer, layer.scores, layer.attention),
                remedy="this model cannot run in float16; run the checkpoint in float32",
            )
        if layer.turns > LARGEST_SUM:
            raise UnsupportedError(
                f"sums of an online rotation in layer {layer.layer} reach {layer.turns:.3g}, the Neural "
                "Engine's accumulator ends at 32768",
                remedy="quantize without online rotations",
            )
    residual = find_power_of_two(max(layer.residual for layer in ranges), LARGEST_FLOAT16 / MARGIN)
    sums = {
        layer_prefix(layer.layer) + name: find_power_of_two(value, LARGEST_SUM / MARGIN)
        for layer in ranges
        for name, value in layer.sums.items()
    }
    return Headroom(tuple(ranges), residual, {name: scale for name, scale in sums.items() if scale != 1})


def describe_moved_attention(layer: int, scores: float, share: float) -> str:
    """Say that float16 is too coarse for the scores of a layer."""
    return (
        f"scores q . k in layer {layer} reach {scores:.3g}, where float16 is so coarse that {share:.0%} of a "
        "token's attention moves"
    )


def describe_coarse_attention(ranges: Sequence[Mapping[str, Any]]) -> str | None:
    """Name the layer whose scores float16 moves most, by a manifest's ranges; None where that is little."""
    worst = max(ranges, key=lambda layer: layer.get("attention", 0.0))
    share = worst.get("attention", 0.0)
    return describe_moved_attention(worst["layer"], worst["scores"], share) if share > NOTED_SHIFT else None


def fit_layer(spec: ModelSpec, layer: QuantizedLayer, headroom: Headroom) -> QuantizedLayer:
    """Return the layer with its share of both scales, unchanged where everything fits already.

    Scales of groups are inside the weight, so nothing moves to them.
    """
    linears = dict(layer.linears)
    for linear in spec.architecture.linears:
        name = layer_prefix(layer.index) + linear.name
        grouped = linears[linear.name].output_scale.ndim == 2
        moved = 1.0 if grouped else headroom.sum_scales.get(name, 1.0)
        written = headroom.residual_scale if linear.output.space is Space.RESIDUAL else 1.0
        if moved != 1 or written != 1:
            linears[linear.name] = _scale_linear(linears[linear.name], moved, written, name)
    return replace(layer, linears=linears)


def fit_table(table: QuantizedLinear | FloatTable, headroom: Headroom) -> QuantizedLinear | FloatTable:
    """Return the embedding with the residual scale."""
    if headroom.residual_scale == 1:
        return table
    if isinstance(table, QuantizedLinear):
        return _scale_linear(table, 1.0, headroom.residual_scale, "embedding")
    return replace(table, scale=headroom.residual_scale)


def _scale_linear(linear: QuantizedLinear, moved: float, written: float, name: str) -> QuantizedLinear:
    codebook = linear.codebook * moved
    output_scale = linear.output_scale / moved * written
    bias = None if linear.bias is None else linear.bias * written
    exact = all(bool((value.half().float() == value).all()) for value in (codebook, output_scale))
    if not exact:
        raise UnsupportedError(
            f"'{name}' cannot be scaled by {moved:g} and {written:g} within float16",
            remedy="quantize it again with scales = 'output'",
        )
    return replace(linear, codebook=codebook, output_scale=output_scale, bias=bias)
