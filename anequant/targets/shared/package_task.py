"""A package to be made of a part of a checkpoint, whatever the back end: its task, content and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anequant.architectures.spec import FINAL_NORM, layer_prefix
from anequant.checkpoints.layers import QuantizedLayer, load_layer
from anequant.checkpoints.reader import Checkpoint
from anequant.lower_options import LowerOptions
from anequant.targets.shared.geometry import Geometry, count_constant_bytes, count_table_bytes
from anequant.targets.shared.headroom import Headroom, fit_layer
from anequant.targets.shared.rope_tables import compute_rope_tables


@dataclass(frozen=True)
class PackageSize:
    """A package's weight file and graph on disk, and what one copy of each of its constants takes."""

    name: str
    weight_bytes: int
    constant_bytes: int
    graph_bytes: int


@dataclass(frozen=True)
class PackageTask:
    """A package called `name` of a checkpoint folder, to be written to a new folder in `home`.

    `part` is EMBEDDING, HEAD, or the layers of a chunk.
    """

    name: str
    part: str | range
    checkpoint: Path
    home: Path
    options: LowerOptions
    headroom: Headroom
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class BuiltPackage:
    path: Path
    size: PackageSize


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers, fitted to float16; `final_gain` is the final norm's where they are the last."""

    geometry: Geometry
    layers: tuple[QuantizedLayer, ...]
    final_gain: Tensor | None

    @property
    def constant_bytes(self) -> int:
        """What one copy of each of its constants takes."""
        spec, online = self.geometry.spec, self.geometry.online
        return count_table_bytes(spec, self.geometry.context, online) + sum(
            count_constant_bytes(weight, rounded=layer_prefix(layer.index) + linear in online.activations)
            for layer in self.layers
            for linear, weight in layer.linears.items()
        )


def load_chunk(checkpoint: Checkpoint, layers: range, options: LowerOptions, headroom: Headroom) -> Chunk:
    """Read the layers of a chunk; raises as `compute_rope_tables` and `fit_layer`."""
    spec = checkpoint.spec
    cos, sin = compute_rope_tables(spec, options.context)
    geometry = Geometry(
        spec, options.context, options.batch, cos, sin, headroom.residual_scale, checkpoint.online
    )
    loaded = tuple(fit_layer(spec, load_layer(checkpoint, layer), headroom) for layer in layers)
    last = layers[-1] == spec.num_layers - 1
    return Chunk(geometry, loaded, checkpoint.read(f"{FINAL_NORM}.weight") if last else None)
