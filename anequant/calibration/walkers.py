"""Input statistics of a layer's linears, from windows that walk through two models side by side.

One walker goes through the float model (folded and rotated), the other through the model as quantized so
far. A layer is two halves, attention and MLP, of the form

    hidden + last(inner(first(norm(hidden)))),

and both walkers stop before `first` and before `last`: for the moments of their inputs, and for the quantized
walker until what it goes through is quantized. So everything runs once, some windows at a time, and beside
hidden states and moments only the quantized input of `last` is held.

What `last` is asked for is its output in the float model and a share of what the quantized model's stream
lacks by then, hidden_float - hidden: so errors of earlier halves are made up for in the stream itself, where
the linears after this one alone would meet them each in its own input.

Where the processor has it, linears and moments take their factors in bfloat16 and add up in float32. That
rounding, 2**-9 of a factor, is far below the errors of quantization that moments are to see, and a Hessian is
still one: of rounded inputs. Scales of activations are measured here too, and written; that walk is `exact`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from anequant.architectures.spec import Linear, ModelSpec, layer_prefix
from anequant.quantization.online import NOTHING, Online
from anequant.quantization.products import add_product, add_square, allow_bfloat16, mirror
from anequant.quantization.statistics import InputStatistics, Moments
from anequant.reference.forward import WINDOWS_AT_ONCE, ReferenceModel

HELD_OUT = 6
COMPENSATION = 0.5
"""Share of the residual stream's error that attention's and the MLP's outputs are asked to make up for; the
target correction takes its own share of that, as of all that a linear's input lacks."""

Measure = Callable[[Linear], InputStatistics]
"""Returns the moments of a group's input as they matter to one of its linears."""


@dataclass(frozen=True, eq=False)
class GroupInputs:
    """What is known of the input that a group of linears reads.

    `measure` returns its moments for one of the linears, None where they are not wanted; `quantized` returns
    the inputs [n, length, in] in the quantized model, some windows at a time.
    """

    group: Sequence[Linear]
    measure: Measure | None
    quantized: Callable[[], Iterator[Tensor]]


class Walkers:
    """Hidden states [n, length, hidden_size] of the same windows in the float and the quantized model.

    The last sixth of the windows, at least one of two or more, is held out. `weights` [n, length] by a
    linear's full name say how much each token counts in its moments; `compensation` is the share of the
    residual stream's error that the outputs of attention and MLP are to make up for. `exact` keeps all
    products in float32.
    """

    def __init__(
        self,
        spec: ModelSpec,
        embedded: Tensor,
        quantized: Tensor,
        online: Online = NOTHING,
        *,
        weights: Mapping[str, Tensor] | None = None,
        compensation: float = 0.0,
        exact: bool = False,
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._compensation = compensation
        self._precision = nullcontext if exact else allow_bfloat16
        self._float, self._quantized = (
            _Walker(ReferenceModel(spec, torch.float32, online.rotations), start.float().clone())
            for start in (embedded, quantized)
        )
        count = len(embedded)
        self._cut = max(1, count - max(1, count // HELD_OUT))
        bounds = [*range(0, self._cut, WINDOWS_AT_ONCE), *range(self._cut, count, WINDOWS_AT_ONCE), count]
        self._parts = [slice(*ends) for ends in itertools.pairwise(bounds)]

    def layer(
        self, layer: int, original: Mapping[str, Tensor], quantized: Mapping[str, Tensor], *, moments: bool
    ) -> Iterator[GroupInputs]:
        """Walk through a layer, and yield every group of linears that read the same input, in their order.

        Both mappings hold all tensors of the layer by name; when the next group is asked for, `quantized` has
        to hold what the linears of the last one have become. `moments` tells whether they are wanted.
        """
        for group in self._spec.input_groups:
            if group[0].norm is not None:
                measure: Measure | None = None
                if moments:
                    measure = partial(self._measure, layer, original, quantized, group)
                    if self._weights is None:
                        measure = partial(_share, measure(group[0]))
                yield GroupInputs(group, measure, partial(self._inputs, layer, quantized, group))
                continue
            statistics, inner = self._leave_half(layer, original, quantized, group, moments=moments)
            measure = None if statistics is None else partial(_share, statistics)
            yield GroupInputs(group, measure, partial(self._windows, inner))
            name = group[0].name
            weight, bias = quantized[f"{name}.weight"].float(), quantized.get(f"{name}.bias")
            with self._precision():
                for part, values in zip(self._parts, inner, strict=True):
                    self._quantized.advance(part, linear(values, weight), bias)
            inner.clear()

    def _measure(
        self,
        layer: int,
        original: Mapping[str, Tensor],
        quantized: Mapping[str, Tensor],
        group: Sequence[Linear],
        reader: Linear,
    ) -> InputStatistics:
        """The moments of a group's input, with the float model's, as they matter to one of the linears."""
        width = original[f"{reader.name}.weight"].shape[1]
        sums = _Split(self._cut, (width, width))
        with self._precision():
            for part, seen, x in self._both(layer, original, quantized, group):
                sums.of(part).add(seen, x, seen, self._weigh(layer, reader, part))
        return sums.statistics(outputs=False)

    def _leave_half(
        self,
        layer: int,
        original: Mapping[str, Tensor],
        quantized: Mapping[str, Tensor],
        group: Sequence[Linear],
        *,
        moments: bool,
    ) -> tuple[InputStatistics | None, list[Tensor]]:
        """Walk the float model through a group that ends its half; return moments with its outputs, and the
        quantized model's inputs, some windows each."""
        name = group[0].name
        weight, bias = original[f"{name}.weight"], original.get(f"{name}.bias")
        sums, inner = _Split(self._cut, weight.shape), []
        with self._precision():
            for part, x_float, x in self._both(layer, original, quantized, group):
                seen = linear(x_float, weight)
                if moments:
                    wanted = seen + self._compensation * self._residual_error(part)
                    sums.of(part).add(wanted, x, x_float, self._weigh(layer, group[0], part))
                self._float.advance(part, seen, bias)
                inner.append(x)
        return (sums.statistics(outputs=True) if moments else None), inner

    def _weigh(self, layer: int, linear: Linear, part: slice) -> Tensor | None:
        """The weights [tokens] of some windows' tokens for a linear; None where all weigh the same."""
        if self._weights is None:
            return None
        return self._weights[layer_prefix(layer) + linear.name][part].flatten()

    def _residual_error(self, part: slice) -> Tensor:
        """Return what the quantized stream lacks where a half is added to it: [tokens, hidden_size]."""
        return (self._float.hidden[part] - self._quantized.hidden[part]).flatten(0, 1)

    def _both(
        self,
        layer: int,
        original: Mapping[str, Tensor],
        quantized: Mapping[str, Tensor],
        group: Sequence[Linear],
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some windows, and the group's input [tokens, in] in both models, at a time."""
        walkers = ((self._float, original), (self._quantized, quantized))
        inputs = [
            walker.model.inputs(layer, tensors, walker.views(self._parts), group[0].name, within=True)
            for walker, tensors in walkers
        ]
        yield from zip(self._parts, *inputs, strict=True)

    def _inputs(
        self, layer: int, quantized: Mapping[str, Tensor], group: Sequence[Linear]
    ) -> Iterator[Tensor]:
        walker = self._quantized
        views = walker.views(self._parts)
        return self._windows(walker.model.inputs(layer, quantized, views, group[0].name, within=True))

    def _windows(self, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
        """Inputs [tokens, in] as [n, length, in]."""
        length = self._quantized.hidden.shape[1]
        return (values.view(-1, length, values.shape[1]) for values in inputs)

    def head_statistics(self, gain: Tensor) -> InputStatistics:
        """Moments of the head's input, after the last layer; `gain` [hidden_size] is the final norm's."""
        sums = _Split(self._cut, (len(gain), len(gain)))
        with self._precision():
            for part in self._parts:
                seen, x = (
                    walker.model.final_norm(walker.hidden[part], gain).flatten(0, 1)
                    for walker in (self._float, self._quantized)
                )
                sums.of(part).add(seen, x, seen, None)
        return sums.statistics(outputs=False)


def _share(statistics: InputStatistics, linear: Linear) -> InputStatistics:
    """Return the moments that all linears of a group share."""
    return statistics


@dataclass(frozen=True, eq=False)
class _Walker:
    """A model, and hidden states [n, length, hidden_size] that move through it in place."""

    model: ReferenceModel
    hidden: Tensor

    def views(self, parts: Sequence[slice]) -> list[Tensor]:
        return [self.hidden[part] for part in parts]

    def advance(self, part: slice, output: Tensor, bias: Tensor | None) -> None:
        """Add a half's output [tokens, hidden_size] to the hidden states of some windows."""
        hidden = self.hidden[part].flatten(0, 1)
        hidden += output
        if bias is not None:
            hidden += bias


class _Split:
    """Sums over the windows that are fitted to, and over those from `cut` on, which are held out."""

    def __init__(self, cut: int, shape: Sequence[int]) -> None:
        self._cut = cut
        self._fit, self._held_out = _Sums(shape), _Sums(shape)

    def of(self, part: slice) -> _Sums:
        return self._held_out if part.start >= self._cut else self._fit

    def statistics(self, *, outputs: bool) -> InputStatistics:
        fit, held_out = (sums.moments(outputs=outputs) for sums in (self._fit, self._held_out))
        return InputStatistics(fit, held_out if held_out.tokens else fit)


class _Sums:
    """Sums over tokens: of x x^T, and of something in the float model times x^T."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._square, self._mixed = torch.zeros(shape[1], shape[1]), torch.zeros(*shape)
        self._paired = torch.zeros(shape[1])
        self._tokens = 0

    def add(self, seen: Tensor, x: Tensor, x_float: Tensor, weights: Tensor | None) -> None:
        """Add tokens: seen [tokens, m], x and x_float [tokens, in], each as often as `weights` [tokens] say,
        once where they are None."""
        if weights is not None:
            root = weights.sqrt()[:, None]
            seen, x, x_float = seen * root, x * root, x_float * root
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
