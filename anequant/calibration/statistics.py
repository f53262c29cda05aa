"""Input statistics of a layer's linears, from windows that walk through two models side by side.

One walker goes through the float model (folded and rotated), the other through the model as quantized so
far. For each group of linears that read the same input, both run the layer up to that input, some
windows at a time, so that nothing but the hidden states and one pair of moments is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from anequant.architectures.spec import ModelSpec
from anequant.calibration.forward import WINDOWS_AT_ONCE, ReferenceModel
from anequant.quantization.online import NOTHING, Online
from anequant.quantization.statistics import InputStatistics, Moments

HELD_OUT = 6


class Walkers:
    """Hidden states [n, length, hidden_size] of the same windows in the float and the quantized model.

    The last sixth of the windows, at least one of two or more, is held out.
    """

    def __init__(
        self, spec: ModelSpec, embedded: Tensor, quantized: Tensor, online: Online = NOTHING
    ) -> None:
        self._models = [ReferenceModel(spec, torch.float32, online.rotations) for _ in range(2)]
        self._hidden = [embedded.float(), quantized.float()]
        count = len(embedded)
        cut = count - max(1, count // HELD_OUT)
        self._fit, self._held_out = slice(0, max(1, cut)), slice(cut, count)

    def input_statistics(
        self, layer: int, original: Mapping[str, Tensor], quantized: Mapping[str, Tensor], name: str
    ) -> InputStatistics:
        """Moments of the input of the linear `name`; both mappings hold all tensors of the layer."""
        fit, held_out = (
            self._moments(layer, original, quantized, name, windows)
            for windows in (self._fit, self._held_out)
        )
        return InputStatistics(fit, held_out)

    def advance(self, layer: int, original: Mapping[str, Tensor], quantized: Mapping[str, Tensor]) -> None:
        """Both walkers through the whole layer."""
        for side, tensors in enumerate((original, quantized)):
            self._hidden[side] = self._models[side].run_layer(layer, tensors, self._hidden[side])

    def quantized_inputs(self, layer: int, quantized: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
        """The inputs [n, length, in] of the linear `name` in the quantized model, some windows at a time."""
        parts = torch.split(self._hidden[1], WINDOWS_AT_ONCE)
        for part, inputs in zip(parts, self._models[1].inputs(layer, quantized, parts, name), strict=True):
            yield inputs.view(*part.shape[:2], -1)

    def head_statistics(self, gain: Tensor) -> InputStatistics:
        """Moments of the head's input, after the last layer; `gain` [hidden_size] is the final norm's."""
        float_input, quantized_input = (
            model.final_norm(hidden, gain) for model, hidden in zip(self._models, self._hidden, strict=True)
        )
        fit, held_out = (
            _moments(float_input[windows].flatten(0, 1), quantized_input[windows].flatten(0, 1))
            for windows in (self._fit, self._held_out)
        )
        return InputStatistics(fit, held_out)

    def _moments(
        self,
        layer: int,
        original: Mapping[str, Tensor],
        quantized: Mapping[str, Tensor],
        name: str,
        windows: slice,
    ) -> Moments:
        width = original[f"{name}.weight"].shape[1]
        hessian, cross = torch.zeros(width, width), torch.zeros(width, width)
        tokens = 0
        sides = [torch.split(hidden[windows], WINDOWS_AT_ONCE) for hidden in self._hidden]
        pairs = zip(
            self._models[0].inputs(layer, original, sides[0], name),
            self._models[1].inputs(layer, quantized, sides[1], name),
            strict=True,
        )
        for float_input, quantized_input in pairs:
            tokens += len(quantized_input)
            hessian.addmm_(quantized_input.T, quantized_input)
            cross.addmm_(float_input.T, quantized_input)
        return Moments(hessian / tokens, cross / tokens, tokens)


def _moments(float_input: Tensor, quantized_input: Tensor) -> Moments:
    tokens = len(quantized_input)
    return Moments(
        quantized_input.T @ quantized_input / tokens, float_input.T @ quantized_input / tokens, tokens
    )
