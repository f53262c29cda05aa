"""The float model after folding and rotation, read piece by piece: what rounding starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, HEAD_LINEAR, ModelSpec, layer_prefix
from anequant.checkpoints.reader import Checkpoint
from anequant.quantization.fold_scales import fold_input_scales
from anequant.quantization.online import NOTHING, Online
from anequant.reference.empty_model import OnDemand
from anequant.rotation.fold import fold_and_rotate_linear, fold_and_rotate_tensor, rotate_embedding
from anequant.rotation.rotation_plan import RotationPlan

ROWS = 4096


@dataclass(frozen=True)
class RotatedModel:
    """A float checkpoint seen through a rotation plan; with `fold_scales`, input scales are moved too.

    `online` is what the quantized model does while it runs.
    """

    checkpoint: Checkpoint
    plan: RotationPlan
    fold_scales: bool
    online: Online = NOTHING

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    def layer(self, layer: int) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return a layer's tensors as stored and, in float64, as rotated; both by name relative to the layer,
        read and made one at a time, since all of them in float64 take four times the layer's place on disk.

        Input scales move within what float32 holds, so that a rotated checkpoint gives the same; this takes
        all of the rotated layer at once.
        """
        names, prefix = list(self.spec.layer_tensors()), layer_prefix(layer)
        original = OnDemand(names, lambda name: self.checkpoint.read(prefix + name))
        rotated = OnDemand(
            names, lambda name: fold_and_rotate_tensor(self.spec, original, self.plan, layer, name)
        )
        if not self.fold_scales:
            return original, rotated
        stored = {name: tensor.float().double() for name, tensor in rotated.items()}
        return original, fold_input_scales(self.spec, stored)

    def float_layer(self, layer: int) -> dict[str, Tensor]:
        """Return a rotated layer's tensors in float32, by name relative to the layer."""
        _, rotated = self.layer(layer)
        return {name: tensor.float() for name, tensor in rotated.items()}

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens [...] as float32 [..., hidden_size]; reads only the rows that are used."""
        used, places = torch.unique(tokens, return_inverse=True)
        name = f"{EMBEDDING}.weight"
        rows = torch.cat([self.checkpoint.read(name, slice(token, token + 1)) for token in used.tolist()])
        return rotate_embedding(rows, self.plan).float()[places]

    def embedding(self) -> Iterator[Tensor]:
        """Yield blocks of at most ROWS embedding rows, float64 [rows, hidden_size]."""
        for start in range(0, self.spec.vocab_size, ROWS):
            rows = self.checkpoint.read(f"{EMBEDDING}.weight", slice(start, start + ROWS))
            yield rotate_embedding(rows, self.plan)

    def head(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks of at most ROWS head rows: as stored, and in float64 with the final gain folded in."""
        gain = self.checkpoint.final_gain()
        for start in range(0, self.spec.vocab_size, ROWS):
            rows = self.checkpoint.read(self.checkpoint.head_name, slice(start, start + ROWS))
            rotated, _ = fold_and_rotate_linear(HEAD_LINEAR, rows, None, gain, self.plan, None)
            yield rows, rotated
