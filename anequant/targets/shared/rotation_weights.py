"""What the convolutions of online rotations hold (`online_rotations`), for whoever counts or checks it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anequant.architectures.spec import ModelSpec
from anequant.quantization.online import Online
from anequant.rotation.hadamard import hadamard, orthonormal_factors
from anequant.rotation.orthogonal import Rotation
from anequant.targets.shared.rotation_names import FFN, KEY, QUERY

WIDEST = 256


def make_online_weights(spec: ModelSpec, online: Online) -> dict[str, list[Tensor]]:
    """Make the weights of every rotation that runs, by QUERY, KEY and FFN."""
    widths = {
        QUERY: (online.r3, spec.num_heads * spec.head_dim),
        KEY: (online.r3, spec.num_key_value_heads * spec.head_dim),
        FFN: (online.r4, spec.intermediate_size),
    }
    return {
        name: make_hadamard_weights(rotation, width)
        for name, (rotation, width) in widths.items()
        if rotation is not None
    }


def make_hadamard_weights(rotation: Rotation, width: int) -> list[Tensor]:
    """Make float16 weights [channels, factor, 1, 1] of convolutions that rotate each `rotation.size` of
    `width` channels, in their order. The rotation is a Hadamard matrix, without signs."""
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
