"""A quantized model in training, run and differentiated one layer at a time, and the float model it learns
from.

Backpropagation goes layer by layer: the way forward keeps only the hidden states before each layer, the way
back dequantizes one layer, runs it again, takes its gradients and moves it at once, so that gradients of one
layer are held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import ModelSpec
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.online import NOTHING, Online
from anequant.quantization.products import allow_bfloat16
from anequant.quantization.tunable_linear import TunableLinear
from anequant.reference.forward import WINDOWS_AT_ONCE, ReferenceModel, Weights, run_to_final_states
from anequant.reference.head_loss import differentiate_head, sum_head_loss

BETAS = (0.9, 0.95)
EPSILON = 1e-12

ENTRIES, SHARE = 16, "share"
"""Entries of a codebook that rates are told for, and what those of another are multiplied by."""


@dataclass(frozen=True, eq=False)
class TunableLayer:
    """A decoder layer in training: linears and norm gains by name relative to the layer."""

    linears: Mapping[str, TunableLinear]
    gains: Mapping[str, Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """All leaves by name."""
        leaves = {
            f"{name}.{key}": leaf
            for name, linear in self.linears.items()
            for key, leaf in linear.leaves.items()
        }
        return leaves | {f"{name}.gain": gain for name, gain in self.gains.items()}

    def current(self) -> LayerState:
        """Return the layer as it stands."""
        linears = {name: linear.current() for name, linear in self.linears.items()}
        return LayerState(linears, {name: gain.detach().clone() for name, gain in self.gains.items()})

    def set_gradients(self, state: LayerState, gradients: Mapping[str, Tensor]) -> None:
        """Set every leaf's `grad` from the gradients for the tensors of `state`, which is the current one."""
        for name, gain in self.gains.items():
            gain.grad = gradients[f"{name}.weight"]
        for name, linear in self.linears.items():
            weight, bias = gradients[f"{name}.weight"], gradients.get(f"{name}.bias")
            linear.set_gradients(state.linears[name], weight, bias)


@dataclass(frozen=True, eq=False)
class LayerState:
    """What a layer in training stands for: rounded linears and norm gains by name."""

    linears: Mapping[str, QuantizedLinear]
    gains: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Return the layer's float tensors as transformers' module takes them."""
        result = {f"{name}.weight": gain for name, gain in self.gains.items()}
        for name, linear in self.linears.items():
            result[f"{name}.weight"] = linear.dequantize()
            if linear.bias is not None:
                result[f"{name}.bias"] = linear.bias
        return result


@dataclass(frozen=True)
class Rates:
    """Learning rates of a step: of latent values among ENTRIES entries, and of everything else."""

    latent: float
    others: float


@dataclass(frozen=True, eq=False)
class Heads:
    """The float model's head and the quantized model's, [vocab, hidden_size], and the latter's norm gain."""

    taught: Tensor
    own: Tensor
    gain: Tensor


class Student:
    """The quantized model in training; `online` are the rotations that run, `embedding` [vocab, hidden_size]
    is its own, and `teacher` the float model."""

    def __init__(
        self,
        spec: ModelSpec,
        teacher: Weights,
        embedding: Tensor,
        layers: Sequence[TunableLayer],
        heads: Heads,
        online: Online = NOTHING,
    ) -> None:
        self._model = ReferenceModel(spec, torch.float32, online)
        self._teacher = teacher
        self._embedding = embedding
        self.layers = layers
        self.heads = heads
        self.optimizers = [*map(_optimize, layers), _make_adam([], [heads.gain])]

    @property
    def leaves(self) -> list[dict[str, Tensor]]:
        """All leaves by name: of every layer, and the final gain; each set has an optimizer of its own."""
        return [*(layer.leaves for layer in self.layers), {"gain": self.heads.gain}]

    def divergence(self, windows: Tensor) -> float:
        """Return the mean KL(float || quantized) over all positions of windows [n, length]."""
        with allow_bfloat16():
            taught = run_to_final_states(self._teacher, windows)
            hidden = self._embedding[windows].float()
            for number, layer in enumerate(self.layers):
                hidden = self._model.run_layer(number, layer.current().tensors(), hidden)
            total = sum_head_loss(self._model, hidden, self.heads.gain, taught, self._divergence)
        return total / windows.numel()

    def learn(self, windows: Tensor, rates: Rates) -> None:
        """Take a step down the gradient of the mean KL over all positions of windows [n, length]."""
        with allow_bfloat16():
            taught = run_to_final_states(self._teacher, windows)
            hidden, inputs = self._embedding[windows].float(), []
            for number, layer in enumerate(self.layers):
                inputs.append(hidden)
                hidden = self._model.run_layer(number, layer.current().tensors(), hidden)
            gain = self.heads.gain
            gradient, gain.grad = differentiate_head(self._model, hidden, gain, taught, self._divergence)
            gradient /= windows.numel()
            gain.grad /= windows.numel()
            self._move(len(self.layers), rates)
            for number in reversed(range(len(self.layers))):
                state = self.layers[number].current()
                gradient, gradients = self._differentiate(number, state, inputs.pop(), gradient)
                self.layers[number].set_gradients(state, gradients)
                self._move(number, rates)

    def _differentiate(
        self, number: int, state: LayerState, hidden: Tensor, gradient: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradients for a layer's input [n, length, hidden_size] and for its tensors."""
        tensors, first = state.tensors(), []
        total: dict[str, Tensor] = {}
        for states, out in zip(hidden.split(WINDOWS_AT_ONCE), gradient.split(WINDOWS_AT_ONCE), strict=True):
            part, gradients = self._model.gradients(number, tensors, states, out)
            first.append(part)
            for name, value in gradients.items():
                total[name] = total[name].add_(value) if name in total else value
        return torch.cat(first), total

    def _move(self, number: int, rates: Rates) -> None:
        optimizer = self.optimizers[number]
        for group in optimizer.param_groups:
            group["lr"] = rates.latent * group[SHARE] if SHARE in group else rates.others
        optimizer.step()
        optimizer.zero_grad()

    def _divergence(self, normed: Tensor, taught: Tensor) -> Tensor:
        """Return the sum of KL(float || quantized) over positions; both are normalised states [positions,
        hidden]."""
        ours = (normed @ self.heads.own.T).log_softmax(-1)
        theirs = (taught @ self.heads.taught.T).log_softmax(-1)
        return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")


def _optimize(layer: TunableLayer) -> torch.optim.Adam:
    """Return the optimizer of a layer's leaves; rates come with every step, those of latent values in
    proportion to how far entries lie apart."""
    latents = [
        {"params": [linear.latent], SHARE: ENTRIES / len(linear.codebook)}
        for linear in layer.linears.values()
    ]
    others = [leaf for name, leaf in layer.leaves.items() if not name.endswith(".latent")]
    return _make_adam(latents, others)


def _make_adam(latents: list[dict[str, Any]], others: list[Tensor]) -> torch.optim.Adam:
    return torch.optim.Adam([*latents, {"params": others}], betas=BETAS, eps=EPSILON)
