"""The quantized model as a function of its rotations: cheap to build, so that rotations can be compared.

Every projection is folded, rotated and rounded to the nearest entries, with the widths, codebook and scales
of the recipe; embedding and head stay float; activations and cache are rounded as the recipe says, a scale
per token. The loss is KL(float || quantized) over all positions.

The gradient for a rotation takes three steps. The layer's own backward pass gives the gradient G of every
stored tensor at its rounded value; rounding passes it straight through (Bengio et al. 2013); and the chain
rule of folding, for example W R -> W^T G, is autograd through `fold_and_rotate_layer` itself. The head is
not rotated: its input is rotated back instead, which is less work and the same product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.architectures.spec import layer_prefix
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.online import Online
from anequant.quantization.weight_format import unfolded_format
from anequant.recipe import Recipe
from anequant.reference.forward import ReferenceModel, Weights
from anequant.reference.head_loss import PIECE
from anequant.rotation.fold import fold_and_rotate_layer, rotate_axis
from anequant.rotation.rotation_plan import R1, R2, RotationPlan


@dataclass(frozen=True)
class Lesson:
    """Windows to learn from: `embedded` [n, length, hidden_size] enters the first layer before it is rotated,
    `taught` [n, length, hidden_size] are the float model's normalised final states."""

    embedded: Tensor
    taught: Tensor

    def windows(self, chosen: slice | list[int]) -> Lesson:
        return Lesson(self.embedded[chosen], self.taught[chosen])


class RotatedStudent:
    """`weights` is the float model; the recipe's static scales count as dynamic ones."""

    def __init__(self, weights: Weights, recipe: Recipe, online: Online) -> None:
        self._weights = weights
        self._spec = weights.spec
        self._recipe = recipe
        self._bits = min(recipe.widths, key=lambda width: abs(width - (recipe.target_bits or recipe.bits)))
        self._model = ReferenceModel(weights.spec, torch.float32, online)
        self._head = weights.read(weights.head_name).float()
        self._gain = weights.final_gain().float()

    @torch.no_grad()
    def divergence(self, plan: RotationPlan, lesson: Lesson) -> float:
        """Return the mean KL over all positions of a lesson whose `embedded` are not rotated."""
        hidden = rotate_axis(lesson.embedded, plan.r1)
        for layer in range(self._spec.num_layers):
            rotated = self._rotate(plan, layer)
            hidden = self._model.run_layer(layer, _tensors(rotated, self._round(rotated, layer)), hidden)
        normed = self._model.final_norm(hidden, torch.ones_like(self._gain))
        back = normed if plan.r1 is None else plan.r1.apply_transposed(normed)
        total = 0.0
        for ours, taught in _pieces(back, lesson.taught):
            total += float(self._loss(ours, taught))
        return total / back[..., 0].numel()

    def gradients(self, plan: RotationPlan, lesson: Lesson) -> tuple[float, dict[str, Tensor]]:
        """Return the mean KL, and its gradients for the plan's `matrices`, by name.

        The lesson has at most WINDOWS_AT_ONCE windows.
        """
        layers = range(self._spec.num_layers)
        leaves = {name: matrix.requires_grad_() for name, matrix in plan.matrices().items()}
        with torch.no_grad():
            hidden, inputs, codes = rotate_axis(lesson.embedded, plan.r1), [], []
            for layer in layers:
                rotated = self._rotate(plan, layer)
                codes.append(self._round(rotated, layer))
                inputs.append(hidden)
                hidden = self._model.run_layer(layer, _tensors(rotated, codes[-1]), hidden)
        r1 = leaves.get(R1)
        divergence, gradient, total = self._end(hidden, lesson.taught, r1)
        gradients: dict[str, Tensor] = {} if total is None else {R1: total}
        for layer in reversed(layers):
            with torch.enable_grad():
                rotated = self._rotate(plan.with_matrices(leaves), layer)
            tensors = _tensors(rotated, codes.pop())
            gradient, stored = self._model.gradients(layer, tensors, inputs.pop(), gradient)
            own = {name: leaves[name] for name in (R1, f"{R2}.{layer}") if name in leaves}
            moved = [name for name, tensor in rotated.items() if tensor.requires_grad]
            outputs, along = [rotated[name] for name in moved], [stored[name].double() for name in moved]
            for name, part in zip(own, torch.autograd.grad(outputs, [*own.values()], along), strict=True):
                gradients[name] = gradients[name] + part if name in gradients else part
        if r1 is not None:
            rows, along_rows = (part.flatten(0, 1).double() for part in (lesson.embedded, gradient))
            gradients[R1] = gradients[R1] + rows.T @ along_rows
        return divergence, gradients

    def _rotate(self, plan: RotationPlan, layer: int) -> dict[str, Tensor]:
        return fold_and_rotate_layer(self._spec, self._weights.layer(layer), plan, layer)

    def _round(self, rotated: Mapping[str, Tensor], layer: int) -> dict[str, QuantizedLinear]:
        """Return the layer's projections, rounded; none at 16 bits."""
        if self._bits == 16:
            return {}
        format_, prefix = unfolded_format(self._recipe, self._bits), layer_prefix(layer)
        return {
            linear.name: quantize_linear(
                rotated[f"{linear.name}.weight"].float(), None, format_, prefix + linear.name
            )
            for linear in self._spec.architecture.linears
        }

    def _end(self, hidden: Tensor, taught: Tensor, r1: Tensor | None) -> tuple[float, Tensor, Tensor | None]:
        """Return the mean KL, and its gradients for hidden [n, length, hidden_size] and for R1."""
        count = hidden[..., 0].numel()
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            back = self._model.final_norm(leaf, torch.ones_like(self._gain))
            if r1 is not None:
                back = back @ r1.float().T
        total, parts = 0.0, []
        for ours, target in _pieces(back.detach(), taught):
            with torch.enable_grad():
                piece = ours.requires_grad_()
                loss = self._loss(piece, target)
            parts.append(torch.autograd.grad(loss, piece)[0])
            total += float(loss.detach())
        outputs = torch.cat(parts).view_as(back) / count
        leaves = [leaf] if r1 is None else [leaf, r1]
        gradient, *others = torch.autograd.grad(back, leaves, outputs)
        return total / count, gradient, others[0] if others else None

    def _loss(self, states: Tensor, taught: Tensor) -> Tensor:
        """Return the sum of KL(float || quantized) over positions, from states [positions, hidden_size] that
        lack the final gain and `taught` that have it."""
        ours = ((states * self._gain) @ self._head.T).log_softmax(-1)
        theirs = (taught @ self._head.T).log_softmax(-1)
        return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")


def _tensors(rotated: Mapping[str, Tensor], rounded: Mapping[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Return the layer's float32 tensors with the weights that `rounded` stands for."""
    weights = {f"{name}.weight": linear.dequantize() for name, linear in rounded.items()}
    kept = {name: tensor.detach().float() for name, tensor in rotated.items() if name not in weights}
    return {**kept, **weights}


def _pieces(states: Tensor, taught: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    ours, theirs = (torch.split(values.flatten(0, 1), PIECE) for values in (states, taught))
    return list(zip(ours, theirs, strict=True))
