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

import torch
from torch import Tensor

from anequant.architectures.spec import ModelSpec
from anequant.coreml.program import Var, float16_constant
from anequant.coreml.toolkit import mb
from anequant.quantization.online import Online
from anequant.rotation.hadamard import hadamard, orthonormal_factors
from anequant.rotation.orthogonal import Rotation

WIDEST = 256
QUERY, KEY, FFN = "r3_query", "r3_key", "r4"
"""What the rotations are called: `weight_name` tells their constants."""


def online_weights(spec: ModelSpec, online: Online) -> dict[str, list[Tensor]]:
    """`hadamard_weights` of every rotation that runs, by QUERY, KEY and FFN."""
    widths = {
        QUERY: (online.r3, spec.num_heads * spec.head_dim),
        KEY: (online.r3, spec.num_key_value_heads * spec.head_dim),
        FFN: (online.r4, spec.intermediate_size),
    }
    return {
        name: hadamard_weights(rotation, width)
        for name, (rotation, width) in widths.items()
        if rotation is not None
    }


def hadamard_weights(rotation: Rotation, width: int) -> list[Tensor]:
    """float16 weights [channels, factor, 1, 1] of convolutions that turn each `rotation.size` of `width`
    channels, in their order. The rotation is a Hadamard matrix, without signs."""
    assert rotation.order is not None and rotation.signs is None
    order = rotation.order
    factors: Sequence[Tensor] = orthonormal_factors(order, torch.float64)
    if order <= WIDEST:
        factors = [hadamard(order).double() / order**0.5]
    weights, outer = [], width // order
    for factor in factors:
        weights.append(factor.T.repeat(outer, 1)[:, :, None, None].half())
        outer *= len(factor)
    return weights


def weight_name(name: str, number: int) -> str:
    """What the constant of a rotation's factor is called."""
    return f"{name}_factor_{number + 1}"


def weight_constants(weights: Sequence[Tensor], name: str) -> list[Var]:
    return [
        float16_constant(weight, tuple(weight.shape), weight_name(name, number))
        for number, weight in enumerate(weights)
    ]


def turned(x: Var, weights: Sequence[Var], name: str) -> Var:
    """x (1, C, 1, S) turned by `weight_constants` for C channels."""
    _, width, _, length = x.shape
    for number, weight in enumerate(weights):
        channels, factor = weight.shape[:2]
        label = f"{name}_{number + 1}"
        if x.shape[1] != channels:
            image = [1, channels, width // channels, length]
            x = mb.reshape(x=x, shape=image, name=f"{label}_image")
        x = mb.conv(x=x, weight=weight, groups=channels // factor, name=f"{label}_turned")
    return x
