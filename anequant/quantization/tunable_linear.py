"""The numbers of a QuantizedLinear that training may move while its codes stay.

Scales are trained by their logarithms, so that they stay positive and a step means the same everywhere.
With G [out, in] the gradient for the dequantized weight W = diag(o) T[Q] diag(d),

    dL/dlog o_r = sum_c (G * W)_rc,   dL/dlog d_c = sum_r (G * W)_rc,
    dL/dT_k     = sum of (diag(o) G diag(d))_rc over the places where Q_rc = k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.quantization.codebook import separate
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import bound_bias, round_bias
from anequant.quantization.scales import round_scales


@dataclass(frozen=True)
class TunableLinear:
    """A linear in training: codes uint8 [out, in]; the rest are float32 leaves whose `grad` is set here.

    log_input_scale is None where the input scales stay ones.
    """

    codes: Tensor
    codebook: Tensor
    log_output_scale: Tensor
    log_input_scale: Tensor | None
    bias: Tensor | None

    @property
    def parameters(self) -> list[Tensor]:
        leaves = (self.codebook, self.log_output_scale, self.log_input_scale, self.bias)
        return [leaf for leaf in leaves if leaf is not None]

    def current(self) -> QuantizedLinear:
        """Return the linear as it stands, in float32."""
        input_scale = torch.ones(self.codes.shape[1])
        if self.log_input_scale is not None:
            input_scale = self.log_input_scale.detach().exp()
        bias = None if self.bias is None else self.bias.detach()
        output_scale = self.log_output_scale.detach().exp()
        return QuantizedLinear(self.codes, self.codebook.detach(), input_scale, output_scale, bias)

    def set_gradients(self, weight_gradient: Tensor, bias_gradient: Tensor | None) -> None:
        """Set every leaf's `grad` from the gradients for the dequantized weight [out, in] and the bias
        [out]."""
        linear = self.current()
        scaled = weight_gradient * linear.output_scale[:, None] * linear.input_scale
        codes = self.codes.view(-1).int()
        self.codebook.grad = torch.bincount(codes, scaled.view(-1), len(self.codebook)).float()
        products = scaled * torch.index_select(linear.codebook, 0, codes).view(scaled.shape)
        self.log_output_scale.grad = products.sum(1)
        if self.log_input_scale is not None:
            self.log_input_scale.grad = products.sum(0)
        if self.bias is not None:
            self.bias.grad = bias_gradient

    def finish(self, name: str) -> QuantizedLinear:
        """Return the linear with numbers that float16 holds, its codebook ascending again."""
        linear = self.current()
        order = linear.codebook.argsort(stable=True)
        codes = order.argsort().to(torch.uint8)[linear.codes.int()]
        rows, columns = round_scales(linear.output_scale, linear.input_scale)
        codebook = separate(linear.codebook.double())
        bias = round_bias(linear.bias, name)
        return bound_bias(QuantizedLinear(codes, codebook, columns, rows, bias), name)


def start_tuning(linear: QuantizedLinear) -> TunableLinear:
    """Return a rounded linear as what training starts from; input scales of one stay."""
    fixed = bool((linear.input_scale == 1).all())
    return TunableLinear(
        linear.codes,
        linear.codebook.clone().requires_grad_(),
        linear.output_scale.log().requires_grad_(),
        None if fixed else linear.input_scale.log().requires_grad_(),
        None if linear.bias is None else linear.bias.clone().requires_grad_(),
    )
