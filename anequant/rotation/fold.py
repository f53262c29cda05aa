"""How a weight follows its norm's gain and the rotations of its two spaces.

RMSNorm(x) = gain * x / rms(x). The gain moves into every linear that reads through the norm:

    W (gain * n) = (W diag(gain)) n,

and the norm that is left has a gain of ones. Since rms(R^T x) = rms(x) for orthogonal R, such a norm
commutes with a rotation. Let x' = R^T x be the rotated residual stream (as a row: x'^T = x^T R). Then

    a linear that reads it    y  = W x + b = (W R) x' + b           its input axis is rotated,
    a linear that writes it   x' = R^T (W u + b) = (R^T W) u + R^T b   its output axis and its bias are,

and the embedding, whose rows are values of x, becomes E R. RMSNorm does not centre, so nothing is
subtracted. R2 does the same between v and o: attention mixes positions, not the coordinates of a value
head, so each head of v's output (and bias) is rotated by R2 and each head of o's input by R2 as well. R4
rotates the SwiGLU product, which nothing writes: the model itself does so while it runs, and down, which
reads it, becomes W R4. R3 rotates q and k after RoPE, both by the same matrix, so that their products stay;
no weight follows.

The final norm's gain goes into the head only, so a tied head is first given its own copy.
References: QuaRot (Ashkboos et al. 2024, section 4), SpinQuant (Liu et al. 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anequant.architectures.spec import RESIDUAL, Linear, ModelSpec
from anequant.rotation.orthogonal import Rotation
from anequant.rotation.rotation_plan import RotationPlan


def fold_and_rotate_linear(
    linear: Linear,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    plan: RotationPlan,
    layer: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of the linear in the folded and rotated model, in float64.

    weight [out, in], bias [out] or None, gain [in] or None; what is returned has the same shapes. Both are
    contiguous, since products of float32 are not the same for every memory layout.
    """
    rotated = None if bias is None else _rotate_bias(linear, bias, plan, layer)
    return _rotate_weight(linear, weight, gain, plan, layer), rotated


def fold_and_rotate_tensor(
    spec: ModelSpec, tensors: Mapping[str, Tensor], plan: RotationPlan, layer: int, name: str
) -> Tensor:
    """Fold and rotate one of a layer's tensors, by name relative to the layer, in float64.

    Beside `tensors` it holds at most two float64 copies of the one that it is asked for.
    """
    module, _, kind = name.rpartition(".")
    if module in spec.norms:
        return torch.ones(spec.hidden_size, dtype=torch.float64)
    linear = next((linear for linear in spec.architecture.linears if linear.name == module), None)
    if linear is None:
        return tensors[name].double()
    if kind == "bias":
        return _rotate_bias(linear, tensors[name], plan, layer)
    gain = tensors[f"{linear.norm}.weight"] if linear.norm else None
    return _rotate_weight(linear, tensors[name], gain, plan, layer)


def fold_and_rotate_layer(
    spec: ModelSpec, tensors: Mapping[str, Tensor], plan: RotationPlan, layer: int
) -> dict[str, Tensor]:
    """Fold and rotate all tensors of one layer, by name relative to the layer, in float64."""
    return {name: fold_and_rotate_tensor(spec, tensors, plan, layer, name) for name in spec.layer_tensors()}


def _rotate_weight(
    linear: Linear, weight: Tensor, gain: Tensor | None, plan: RotationPlan, layer: int | None
) -> Tensor:
    weight = weight.double() if gain is None else weight * gain.double()
    weight = rotate_axis(weight, plan.input_rotation(linear.input.space, layer))
    weight = rotate_axis(weight.T, plan.output_rotation(linear.output.space, layer))
    return weight.T.contiguous()


def _rotate_bias(linear: Linear, bias: Tensor, plan: RotationPlan, layer: int | None) -> Tensor:
    return rotate_axis(bias.double(), plan.output_rotation(linear.output.space, layer))


def rotate_embedding(rows: Tensor, plan: RotationPlan) -> Tensor:
    """Rotate embedding rows [n, hidden_size] into the rotated residual stream, in float64."""
    return rotate_axis(rows.double(), plan.output_rotation(RESIDUAL.space, None))


def rotate_axis(values: Tensor, rotation: Rotation | None) -> Tensor:
    """Return values @ R along the last axis, [..., k * R.size]: each of the k heads is rotated by the same
    R."""
    if rotation is None:
        return values
    return rotation.apply(values.reshape(*values.shape[:-1], -1, rotation.size)).flatten(-2)
