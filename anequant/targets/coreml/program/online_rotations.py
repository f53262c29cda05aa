"""Hadamard rotations that run between a layer's linears: R3 and R4 as grouped 1x1 convolutions.

A Hadamard matrix of order n over blocks of the channels is kron(I, M1, ..., Mp) with small orthonormal M.
Seen as (1, a f, r, S), the channels C = a f r of an image (1, C, 1, S) have the coordinate that a factor M
[f, f] mixes in the middle, and a convolution 1x1 of `a` groups with M.T in each of them is the product. No
transposition is needed, since each image is a reshape of the other, and no axis is longer than C. A matrix
of up to WIDEST is one factor: of blocks it is one grouped convolution. Every factor is orthonormal, so what
they mix keeps its Euclidean norm, which bounds every sum (see `calibration.ranges`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from anequant.targets.coreml.program.program import Var, float16_constant
from anequant.targets.coreml.toolkit import mb
from anequant.targets.shared.rotation_names import name_factor


def emit_weights(weights: Sequence[Tensor], name: str) -> list[Var]:
    return [
        float16_constant(weight, tuple(weight.shape), name_factor(name, number))
        for number, weight in enumerate(weights)
    ]


def rotate_channels(x: Var, weights: Sequence[Var], name: str) -> Var:
    """Rotate x (1, C, 1, S) by the `emit_weights` of C channels."""
    _, width, _, length = x.shape
    for number, weight in enumerate(weights):
        channels, factor = weight.shape[:2]
        label = f"{name}_{number + 1}"
        if x.shape[1] != channels:
            image = [1, channels, width // channels, length]
            x = mb.reshape(x=x, shape=image, name=f"{label}_image")
        x = mb.conv(x=x, weight=weight, groups=channels // factor, name=f"{label}_turned")
    return x
