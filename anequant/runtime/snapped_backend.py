"""A per-tensor checkpoint as ANEMLL's loader rebuilds it, run by transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anequant.architectures.spec import ModelSpec, layer_prefix
from anequant.checkpoints.layers import open_quantized
from anequant.checkpoints.layout import list_projections
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint
from anequant.quantization.online import Online
from anequant.runtime.transformers_backend import TransformersModel


@dataclass(frozen=True)
class SnappedWeights:
    """A Checkpoint whose projections are divided by their scales, snapped to the codebook and scaled back.

    A projection without a codebook is what is stored, since the loader does not snap it.
    """

    checkpoint: Checkpoint

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def online(self) -> Online:
        return self.checkpoint.online

    @property
    def head_name(self) -> str:
        return self.checkpoint.head_name

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(name)

    def final_gain(self) -> Tensor:
        return self.checkpoint.final_gain()

    def layer(self, layer: int) -> dict[str, Tensor]:
        names = [layer_prefix(layer) + linear.name for linear in self.spec.architecture.linears]
        snapped = {f"{name.removeprefix(layer_prefix(layer))}.weight": self.weight(name) for name in names}
        return {**self.checkpoint.layer(layer), **snapped}

    def weight(self, name: str) -> Tensor:
        """Return projection `name` as loaded, float32 [out, in]; raises InputError as `load` does."""
        if f"{name}.codebook" not in self.checkpoint.tensors:
            return self.read(f"{name}.weight").float()
        return load(name, self.read, self.checkpoint.tensors).dequantize()


class SnappedModel(TransformersModel):
    """The Decoder over SnappedWeights."""

    def __init__(self, folder: Path) -> None:
        weights = SnappedWeights(open_quantized(folder))
        super().__init__(folder)
        with torch.no_grad():
            for name in list_projections(weights.spec):
                self._model.get_parameter(f"{name}.weight").copy_(weights.weight(name))
