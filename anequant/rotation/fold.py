"""How a weight follows its norm's gain and the rotations of its two spaces.

RMSNorm(x) = gain * x / rms(x). The gain moves into every linear that reads through the norm:

    W (gain * n) = (W diag(gain)) n,

and the norm that is left has a gain of ones. Since rms(R^T x) = rms(x) for orthogonal R, such a norm
commutes with a rotation. Let x' = R^T x be the rotated residual stream (as a row: x'^T = x^T R). Then

    a linear that reads it    y  = W x + b = (W R) x' + b           its input axis turns,
    a linear that writes it   x' = R^T (W u + b) = (R^T W) u + R^T b   its output axis and its bias turn,

and the embedding, whose rows are values of x, becomes E R. RMSNorm does not centre, so nothing is
subtracted. R2 does the same between v and o: attention mixes positions, not the coordinates of a value
head, so each head of v's output (and bias) turns by R2 and each head of o's input by R2 as well. R4 turns
the SwiGLU product, which nothing writes: the model itself turns it while it runs, and down, which reads it,
becomes W R4. R3 turns q and k after RoPE, both by the same matrix, so that their products stay; no weight
follows.

The final norm's gain goes into the head only, so a tied head is first given its own copy.
References: QuaRot (Ashkboos et al. 2024, section 4), SpinQuant (Liu et al. 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anequant.architectures.spec import RESIDUAL, Linear, ModelSpec
from anequant.rotation.orthogonal import Rotation
from anequant.rotation.plan import RotationPlan


def fold_and_rotate_linear(
    linear: Linear,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    plan: RotationPlan,
    layer: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The linear in the folded and rotated model, in float64.

    weight [out, in], bias [out] or None, gain [in] or None; returns weight and bias of the same shapes. Both
    are contiguous, since products of float32 are not the same for every memory layout.
    """
    weight = weight.double()
    if gain is not None:
        weight = weight * gain.double()
    weight = rotate_axis(weight, plan.read(linear.input.space, layer))
    turn_output = plan.written(linear.output.space, layer)
    weight = rotate_axis(weight.T, turn_output).T.contiguous()
    if bias is not None:
        bias = rotate_axis(bias.double(), turn_output)
    return weight, bias


def fold_and_rotate_layer(
    spec: ModelSpec, tensors: Mapping[str, Tensor], plan: RotationPlan, layer: int
) -> dict[str, Tensor]:
    """All tensors of one layer, by name relative to the layer, folded and rotated in float64."""
    result = {f"{name}.weight": torch.ones(spec.hidden_size, dtype=torch.float64) for name in spec.norms}
    for name in spec.architecture.head_norms:
        result[f"{name}.weight"] = tensors[f"{name}.weight"].double()
    for linear in spec.architecture.linears:
        gain = tensors[f"{linear.norm}.weight"] if linear.norm else None
        weight, bias = fold_and_rotate_linear(
            linear, tensors[f"{linear.name}.weight"], tensors.get(f"{linear.name}.bias"), gain, plan, layer
        )
        result[f"{linear.name}.weight"] = weight
        if bias is not None:
            result[f"{linear.name}.bias"] = bias
    return result


def rotate_embedding(rows: Tensor, plan: RotationPlan) -> Tensor:
    """Embedding rows [n, hidden_size] in the rotated residual stream, in float64."""
    return rotate_axis(rows.double(), plan.written(RESIDUAL.space, None))


def rotate_axis(values: Tensor, rotation: Rotation | None) -> Tensor:
    """values @ R along the last axis, [..., k * R.size]: each of the k heads turns by the same R."""
    if rotation is None:
        return values
    return rotation.apply(values.reshape(*values.shape[:-1], -1, rotation.size)).flatten(-2)
