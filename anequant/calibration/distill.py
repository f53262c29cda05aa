"""Distillation: the quantized model learns the float model's next-token distribution, codes fixed.

The loss is KL(float || quantized) over all positions of a few windows. Backpropagation goes layer by layer:
the way forward keeps only the hidden states before each layer, the way back dequantizes one layer, runs it
again and takes its gradients. Memory is the codes, one layer in float32 and the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.architectures.spec import ModelSpec
from anequant.jobs.control import Progress, silent
from anequant.quantization.online import NOTHING, Online
from anequant.quantization.tunable_linear import TunableLinear
from anequant.reference.forward import ReferenceModel, differentiate_head, sum_head_loss

WINDOWS_A_STEP = 2
LEARNING_RATE = 5e-4
WARM_UP = 10
EVALUATE_EVERY = 25
PATIENCE = 3


@dataclass(frozen=True)
class TunableLayer:
    """A decoder layer in training: linears and norm gains by name relative to the layer."""

    linears: Mapping[str, TunableLinear]
    gains: Mapping[str, Tensor]

    @property
    def parameters(self) -> list[Tensor]:
        return [leaf for linear in self.linears.values() for leaf in linear.parameters] + [
            *self.gains.values()
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Return the layer's float tensors as transformers' module takes them."""
        result = {f"{name}.weight": gain.detach() for name, gain in self.gains.items()}
        for name, linear in self.linears.items():
            current = linear.current()
            result[f"{name}.weight"] = current.dequantize()
            if current.bias is not None:
                result[f"{name}.bias"] = current.bias
        return result

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        for name, gain in self.gains.items():
            gain.grad = gradients[f"{name}.weight"]
        for name, linear in self.linears.items():
            linear.set_gradients(gradients[f"{name}.weight"], gradients.get(f"{name}.bias"))


@dataclass(frozen=True)
class Lesson:
    """Windows to learn from: `embedded` [n, length, hidden_size] enters the quantized model's first layer,
    `taught` [n, length, hidden_size] are the float model's normalised final states."""

    embedded: Tensor
    taught: Tensor

    def windows(self, chosen: slice | list[int]) -> Lesson:
        return Lesson(self.embedded[chosen], self.taught[chosen])


@dataclass(frozen=True)
class Heads:
    """The float model's head and the quantized model's, [vocab, hidden_size], and the latter's norm gain."""

    taught: Tensor
    own: Tensor
    gain: Tensor


@dataclass(frozen=True)
class Course:
    """What a student learns from, and for how many steps: each is on a few windows of `lesson` that `seed`
    draws, and the state that is best on `held_out` stays."""

    lesson: Lesson
    held_out: Lesson
    steps: int
    seed: int


@dataclass(frozen=True)
class LearnResult:
    """KL on the held-out windows before and after; `steps` were taken until the best state."""

    steps: int
    held_out_before: float
    held_out_after: float


def distill(student: Student, course: Course, progress: Progress = silent) -> LearnResult:
    """Train the student's layers and its final gain, which end in the state that was best on the held-out
    windows."""
    leaves, steps = student.parameters, course.steps
    optimizer = torch.optim.Adam(leaves, betas=(0.9, 0.95), eps=1e-12)
    generator = torch.Generator().manual_seed(course.seed)
    first = least = student.divergence(course.held_out)
    kept, best_step = [leaf.detach().clone() for leaf in leaves], 0
    queue: list[int] = []
    for step in range(1, steps + 1):
        progress(f"step {step} of {steps}, held-out KL {least:.4f}", step / steps)
        rate = LEARNING_RATE * min(1.0, step / WARM_UP) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        if len(queue) < WINDOWS_A_STEP:
            queue = torch.randperm(len(course.lesson.taught), generator=generator).tolist()
        chosen, queue = queue[:WINDOWS_A_STEP], queue[WINDOWS_A_STEP:]
        student.set_gradients(course.lesson.windows(chosen))
        optimizer.step()
        if step % EVALUATE_EVERY == 0 or step == steps:
            loss = student.divergence(course.held_out)
            if loss < least:
                least, best_step, kept = loss, step, [leaf.detach().clone() for leaf in leaves]
            elif step - best_step >= PATIENCE * EVALUATE_EVERY:
                break
    with torch.no_grad():
        for leaf, value in zip(leaves, kept, strict=True):
            leaf.copy_(value)
    return LearnResult(best_step, first, least)


class Student:
    """The quantized model in training, run and differentiated one layer at a time; `online` are the rotations
    that run."""

    def __init__(
        self, spec: ModelSpec, layers: Sequence[TunableLayer], heads: Heads, online: Online = NOTHING
    ) -> None:
        self._model = ReferenceModel(spec, torch.float32, online)
        self._layers = layers
        self._heads = heads

    @property
    def parameters(self) -> list[Tensor]:
        return [leaf for layer in self._layers for leaf in layer.parameters] + [self._heads.gain]

    def divergence(self, lesson: Lesson) -> float:
        """Return the mean KL over all positions."""
        hidden = lesson.embedded
        for number, layer in enumerate(self._layers):
            hidden = self._model.run_layer(number, layer.tensors(), hidden)
        total = sum_head_loss(self._model, hidden, self._heads.gain, lesson.taught, self._divergence)
        return total / hidden[..., 0].numel()

    def set_gradients(self, lesson: Lesson) -> None:
        """Set the `grad` of every parameter to the gradient of the mean KL."""
        hidden, inputs = lesson.embedded, []
        for number, layer in enumerate(self._layers):
            inputs.append(hidden)
            hidden = self._model.run_layer(number, layer.tensors(), hidden)
        gain = self._heads.gain
        gradient, gain.grad = differentiate_head(self._model, hidden, gain, lesson.taught, self._divergence)
        count = hidden[..., 0].numel()
        gradient /= count
        gain.grad /= count
        for number in reversed(range(len(self._layers))):
            layer = self._layers[number]
            gradient, gradients = self._model.gradients(number, layer.tensors(), inputs.pop(), gradient)
            layer.set_gradients(gradients)

    def _divergence(self, normed: Tensor, taught: Tensor) -> Tensor:
        """Return the sum of KL(float || quantized) over positions; both are normalised states [positions,
        hidden]."""
        ours = (normed @ self._heads.own.T).log_softmax(-1)
        theirs = (taught @ self._heads.taught.T).log_softmax(-1)
        return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
