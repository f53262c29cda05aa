"""A QuantizedLinear in training: its codes move, and so do its codebook, scales and bias.

A code is the entry nearest to a latent value u in the unit domain, where the weight is W / (o d):

    W^ = diag(o) T[Q(u)] diag(d),   Q(u) the code of the entry of T that is nearest to u.

Q has no slope, so the gradient passes straight through it (Bengio et al. 2013): dL/du is that for T[Q(u)],
though it is a pull on u only until another entry is nearer. Scales are trained by their logarithms, so that
they stay positive and a step means the same everywhere. With G [out, in] the gradient for W^,

    dL/du       = diag(o) G diag(d),
    dL/dlog o_r = sum_c (G * W^)_rc,   dL/dlog d_c = sum_r (G * W^)_rc,        (* is entrywise)
    dL/dT_k     = sum of dL/du_rc over the places whose code is k.

Where u starts decides what training can do. Rounding has chosen codes that make up for each other's errors,
and many are not those nearest to the weight: started at the weight itself, these flip back in the first steps
and the feedback is undone. Started at the entries, nothing ever reaches the end of its cell. So u starts on
the way from the entry to the point of its cell that is nearest to the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.quantization.codebook import find_nearest_codes, separate
from anequant.quantization.codebook_kernels import look_up
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import bound_bias, divide_by_scales, round_bias
from anequant.quantization.scales import round_scales

START = 0.7
"""How far latent values start from the entry, 0, towards where the weight lies inside of its cell, 1."""


@dataclass(frozen=True, eq=False)
class TunableLinear:
    """A linear in training: float32 leaves, which change in place and whose `grad` is set here.

    latent            [out, in]  in the unit domain; the nearest entry is the code
    codebook          [K]        in no order
    log_output_scale  [out]
    log_input_scale   [in], or None where the input scales stay ones
    bias              [out] or None
    """

    latent: Tensor
    codebook: Tensor
    log_output_scale: Tensor
    log_input_scale: Tensor | None
    bias: Tensor | None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The leaves that there are, by name."""
        leaves = {
            "latent": self.latent,
            "codebook": self.codebook,
            "log_output_scale": self.log_output_scale,
            "log_input_scale": self.log_input_scale,
            "bias": self.bias,
        }
        return {name: leaf for name, leaf in leaves.items() if leaf is not None}

    def current(self) -> QuantizedLinear:
        """Return the linear as it stands, in float32, its codebook ascending."""
        codebook = self.codebook.detach().sort().values
        codes = find_nearest_codes(self.latent.detach(), codebook)
        input_scale = torch.ones(codes.shape[1])
        if self.log_input_scale is not None:
            input_scale = self.log_input_scale.detach().exp()
        bias = None if self.bias is None else self.bias.detach().clone()
        return QuantizedLinear(codes, codebook, input_scale, self.log_output_scale.detach().exp(), bias)

    def set_gradients(
        self, linear: QuantizedLinear, weight_gradient: Tensor, bias_gradient: Tensor | None
    ) -> None:
        """Set every leaf's `grad` from the gradients for the weight [out, in] and the bias [out] of `linear`,
        which is what this one currently stands for."""
        scaled = (weight_gradient * linear.output_scale[:, None]).mul_(linear.input_scale)
        self.latent.grad = scaled
        sums = torch.bincount(linear.codes.view(-1), scaled.view(-1), len(linear.codebook)).float()
        self.codebook.grad = torch.empty_like(sums)
        self.codebook.grad[self.codebook.detach().argsort()] = sums
        products = look_up(linear.codebook, linear.codes).mul_(scaled)
        self.log_output_scale.grad = products.sum(1)
        if self.log_input_scale is not None:
            self.log_input_scale.grad = products.sum(0)
        if self.bias is not None:
            self.bias.grad = bias_gradient


def start_tuning(linear: QuantizedLinear, weight: Tensor) -> TunableLinear:
    """Return a rounded linear as what training starts from, which stands for the same weight; `weight` [out,
    in] is its float original. Input scales of one stay."""
    fixed = bool((linear.input_scale == 1).all())
    return TunableLinear(
        _start_latent(linear, weight).requires_grad_(),
        linear.codebook.clone().requires_grad_(),
        linear.output_scale.log().requires_grad_(),
        None if fixed else linear.input_scale.log().requires_grad_(),
        None if linear.bias is None else linear.bias.clone().requires_grad_(),
    )


def _start_latent(linear: QuantizedLinear, weight: Tensor) -> Tensor:
    """Return latent values [out, in] inside of the cells of the linear's codes, towards the weight."""
    middles = (linear.codebook[1:] + linear.codebook[:-1]) / 2
    ends = torch.tensor([torch.inf])
    low, high = (
        look_up(bound, linear.codes) for bound in (torch.cat([-ends, middles]), torch.cat([middles, ends]))
    )
    wanted = divide_by_scales(weight, linear.output_scale, linear.input_scale).clamp_(low, high)
    return torch.lerp(look_up(linear.codebook, linear.codes), wanted, START)


def finish_tuning(linear: QuantizedLinear, name: str) -> QuantizedLinear:
    """Return a trained linear with numbers that float16 holds."""
    rows, columns = round_scales(linear.output_scale, linear.input_scale)
    codebook = separate(linear.codebook.double())
    return bound_bias(
        QuantizedLinear(linear.codes, codebook, columns, rows, round_bias(linear.bias, name)), name
    )
