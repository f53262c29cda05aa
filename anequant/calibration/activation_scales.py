"""What the inputs of a layer's linears look like: the magnitudes that static scales are chosen from.

Inputs come a few windows at a time and are not kept. `prefix` positions of every window stay in float when
the model runs, so they do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from anequant.architectures.spec import INPUT_SCALES
from anequant.quantization.activations import BINS, static_scale

Inputs = Callable[[], Iterable[Tensor]]
"""Inputs [n, length, in] of some linears, some windows at a time; may be asked for repeatedly."""


def largest_magnitudes(inputs: Iterable[Tensor], prefix: int) -> Tensor:
    """Largest |x| of every channel: float32 [in]."""
    return torch.stack([part[:, prefix:].abs().amax((0, 1)) for part in inputs]).amax(0)


def static_scales(
    tensors: Mapping[str, Tensor], inputs: Inputs, widths: Mapping[str, int], kind: str, prefix: int
) -> dict[str, float]:
    """The static scale of each linear in `widths` (bits), by name relative to the layer; all read `inputs`.

    tensors are the layer's, with the input scales [1, in] of linears that have them.
    """
    if not widths:
        return {}
    factors = {name: tensors.get(f"{name}.{INPUT_SCALES}", torch.ones(1)) for name in widths}
    channels = largest_magnitudes(inputs(), prefix)
    largest = {name: float((channels * factor).max()) for name, factor in factors.items()}
    counts = {name: torch.zeros(BINS) for name in widths}
    for part in inputs() if kind != "absmax" else ():
        later = part[:, prefix:].abs()
        for name, factor in factors.items():
            counts[name] += torch.histc(later * factor, BINS, 0, largest[name] or 1.0)
    return {name: static_scale(counts[name], largest[name], bits, kind) for name, bits in widths.items()}


def smoothed_scale(balanced: Tensor, magnitudes: Tensor, strength: float) -> Tensor:
    """An input scale [in] between the weight's and the activations' wishes, a number float16 holds.

    SmoothQuant (Xiao et al. 2023, equation 4) divides activations by s_j = max|X_j|^a / max|W_j|^(1-a). Here
    the input scale multiplies them, and what the weight wants is `balanced` [in]: balanced^(1-a) / max|X|^a,
    with a geometric mean of one.
    """
    floor = float(magnitudes.max()) * 1e-6 or 1.0
    wanted = (1 - strength) * balanced.log() - strength * magnitudes.clamp_min(floor).log()
    return (wanted - wanted.mean()).clamp(-5.0, 5.0).exp().half().float()
