"""Input statistics of a layer's linears, from windows that walk through two models side by side.

One walker goes through the float model (folded and rotated), the other through the model as quantized so
far. A layer is two halves, attention and MLP, of the form

    hidden + last(inner(first(norm(hidden)))),

and both walkers stop before `first` and before `last`: for the moments of their inputs, and for the quantized
walker until what it goes through is quantized. So everything runs once, some windows at a time, and beside
hidden states and moments only the quantized input of `last` is held.

Where the processor has it, linears and moments take their factors in bfloat16 and add up in float32. That
rounding, 2**-9 of a factor, is far below the errors of quantization that moments are to see, and a Hessian is
still one: of rounded inputs. Scales of activations are measured here too, and written; that walk is `exact`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import linear

from anequant.architectures.spec import Linear, ModelSpec
from anequant.quantization.online import NOTHING, Online
from anequant.quantization.products import add_product, add_square, allow_bfloat16, mirror
from anequant.quantization.statistics import InputStatistics, Moments
from anequant.reference.forward import WINDOWS_AT_ONCE, ReferenceModel

HELD_OUT = 6


class Walkers:
    """Hidden states [n, length, hidden_size] of the same windows in the float and the quantized model.

    The last sixth of the windows, at least one of two or more, is held out. Every group of linears that read
    the same input takes a `read` and, with what they have become, a `write`, in their order. `exact` keeps
    all products in float32.
    """

    def __init__(
        self,
        spec: ModelSpec,
        embedded: Tensor,
        quantized: Tensor,
        online: Online = NOTHING,
        *,
        exact: bool = False,
    ) -> None:
        self._precision = nullcontext if exact else allow_bfloat16
        self._models = [ReferenceModel(spec, torch.float32, online.rotations) for _ in range(2)]
        self._hidden = [embedded.float().clone(), quantized.float().clone()]
        count = len(embedded)
        self._cut = max(1, count - max(1, count // HELD_OUT))
        bounds = [*range(0, self._cut, WINDOWS_AT_ONCE), *range(self._cut, count, WINDOWS_AT_ONCE), count]
        self._parts = [slice(*ends) for ends in itertools.pairwise(bounds)]
        self._inner: list[Tensor] = []

    def read(
        self,
        layer: int,
        original: Mapping[str, Tensor],
        quantized: Mapping[str, Tensor],
        group: Sequence[Linear],
        *,
        moments: bool,
    ) -> InputStatistics | None:
        """Walk to the input of a group; its moments where they are wanted. Both mappings hold all tensors of
        the layer."""
        name, ends = group[0].name, group[0].norm is None
        if not (ends or moments):
            return None
        weight, bias = original[f"{name}.weight"], original.get(f"{name}.bias")
        sums = [_Sums(weight.shape if ends else (weight.shape[1], weight.shape[1])) for _ in range(2)]
        inner = []
        sides = (original, quantized)
        inputs = [
            self._models[side].inputs(layer, sides[side], self._views(side), name, within=True)
            for side in range(2)
        ]
        with self._precision():
            for part, float_input, quantized_input in zip(self._parts, *inputs, strict=True):
                seen = float_input
                if ends:
                    seen = linear(float_input, weight)
                    self._advance(0, part, seen, bias)
                    inner.append(quantized_input)
                if moments:
                    sums[part.start >= self._cut].add(seen, quantized_input, float_input)
        self._inner = inner
        if not moments:
            return None
        fit, held_out = (total.moments(outputs=ends) for total in sums)
        return InputStatistics(fit, held_out if held_out.tokens else fit)

    def write(self, quantized: Mapping[str, Tensor], group: Sequence[Linear]) -> None:
        """Walk the quantized model through a group that ends its half of the layer."""
        name = group[0].name
        if group[0].norm is not None:
            return
        weight, bias = quantized[f"{name}.weight"].float(), quantized.get(f"{name}.bias")
        with self._precision():
            for part, inner in zip(self._parts, self._inner, strict=True):
                self._advance(1, part, linear(inner, weight), bias)
        self._inner = []

    def quantized_inputs(
        self, layer: int, quantized: Mapping[str, Tensor], group: Sequence[Linear]
    ) -> Iterator[Tensor]:
        """The inputs [n, length, in] of the group that was read last, in the quantized model, some windows at
        a time."""
        inputs: Iterator[Tensor] = iter(self._inner)
        if group[0].norm is not None:
            inputs = self._models[1].inputs(layer, quantized, self._views(1), group[0].name, within=True)
        length = self._hidden[1].shape[1]
        return (values.view(-1, length, values.shape[1]) for values in inputs)

    def head_statistics(self, gain: Tensor) -> InputStatistics:
        """Moments of the head's input, after the last layer; `gain` [hidden_size] is the final norm's."""
        sums = [_Sums((len(gain), len(gain))) for _ in range(2)]
        with self._precision():
            for part in self._parts:
                seen, quantized = (
                    model.final_norm(hidden[part], gain).flatten(0, 1)
                    for model, hidden in zip(self._models, self._hidden, strict=True)
                )
                sums[part.start >= self._cut].add(seen, quantized, seen)
        fit, held_out = (total.moments(outputs=False) for total in sums)
        return InputStatistics(fit, held_out if held_out.tokens else fit)

    def _views(self, side: int) -> list[Tensor]:
        return [self._hidden[side][part] for part in self._parts]

    def _advance(self, side: int, part: slice, output: Tensor, bias: Tensor | None) -> None:
        """Add a half's output [tokens, hidden_size] to the hidden states of some windows."""
        hidden = self._hidden[side][part].flatten(0, 1)
        hidden += output
        if bias is not None:
            hidden += bias


class _Sums:
    """Sums over tokens: of x x^T, and of something in the float model times x^T."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._square, self._mixed = torch.zeros(shape[1], shape[1]), torch.zeros(*shape)
        self._paired = torch.zeros(shape[1])
        self._tokens = 0

    def add(self, seen: Tensor, x: Tensor, x_float: Tensor) -> None:
        """seen [tokens, m], x and x_float [tokens, in]."""
        self._paired += (x * x_float).sum(0)
        add_square(self._square, x)
        add_product(self._mixed, seen.T, x)
        self._tokens += len(x)

    def moments(self, *, outputs: bool) -> Moments:
        count = max(1, self._tokens)
        mirror(self._square)
        square, mixed = self._square.div_(count), self._mixed.div_(count)
        if outputs:
            return Moments(square, self._tokens, None, mixed, self._paired / count)
        return Moments(square, self._tokens, mixed)
