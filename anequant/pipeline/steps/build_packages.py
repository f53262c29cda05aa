"""Packages: the embedding's, one for every chunk of layers, the head's, and the files beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anequant.architectures.spec import EMBEDDING, HEAD, layer_prefix
from anequant.checkpoints.reader import Checkpoint
from anequant.jobs.control import Progress
from anequant.jobs.step import Step, Work
from anequant.pipeline.lowering import Lowering
from anequant.pipeline.steps.sizes import (
    FLOAT32,
    count_packed_bytes,
    count_packing_work,
    count_stored_bytes,
    count_table_weights,
)
from anequant.quantization.linear import ROWS
from anequant.targets.shared.geometry import count_layer_bytes, count_table_bytes, count_vocabulary_bytes
from anequant.targets.shared.package_task import PackageSize


@dataclass(frozen=True, eq=False)
class BuildPackage(Step[Lowering, PackageSize]):
    """Build the package of a `number`, in running order; `written` is quantized, or will be."""

    stage = "lower"
    kind = "package"
    result = PackageSize

    written: Checkpoint
    number: int

    def run(self, state: Lowering, progress: Progress) -> PackageSize:
        return state.build(self.number)

    def accept(self, state: Lowering, result: PackageSize) -> None:
        state.sizes.append(result)

    def tell(self, result: PackageSize) -> Sequence[str]:
        return (f"{(result.weight_bytes + result.graph_bytes) / 1e6:.1f} MB",)


@dataclass(frozen=True, eq=False)
class BuildTable(BuildPackage):
    """The package of the embedding or of the head, by its `name` in the model."""

    name: str

    @property
    def id(self) -> str:
        return {EMBEDDING: "embedding package", HEAD: "head package"}[self.name]

    @property
    def moves(self) -> tuple[int, int]:
        return count_stored_bytes(self.written, f"{self.name}."), count_vocabulary_bytes(
            self.written, self.name
        )

    @property
    def holds(self) -> int:
        spec = self.written.spec
        if f"{self.name}.codebook" in self.written.tensors:
            return count_packed_bytes([count_table_weights(spec)])
        return ROWS * FLOAT32 * spec.hidden_size

    @property
    def cost(self) -> Work:
        return count_packing_work(count_table_weights(self.written.spec))


@dataclass(frozen=True, eq=False)
class BuildChunk(BuildPackage):
    """The package of some consecutive layers, one of so many `chunks`."""

    layers: range
    chunks: int
    context: int

    @property
    def id(self) -> str:
        return f"chunk {self.number} of {self.chunks}"

    @property
    def moves(self) -> tuple[int, int]:
        read = sum(count_stored_bytes(self.written, layer_prefix(layer)) for layer in self.layers)
        sizes = count_layer_bytes(self.written)
        shared = count_table_bytes(self.written.spec, self.context, self.written.online)
        return read, sum(sizes[layer] for layer in self.layers) + shared

    @property
    def holds(self) -> int:
        return count_packed_bytes(list(self.written.spec.linear_weights.values()) * len(self.layers))

    @property
    def cost(self) -> Work:
        return count_packing_work(len(self.layers) * self.written.spec.layer_weights)


@dataclass(frozen=True, eq=False)
class WritePackageFiles(Step[Lowering, None]):
    """Write meta.yaml, the tokenizer and the manifest beside the `packages`, which are hashed."""

    stage = "lower"
    kind = "package files"

    packages: Sequence[BuildPackage]

    @property
    def moves(self) -> tuple[int, int]:
        return count_package_bytes(self.packages), 0

    def run(self, state: Lowering, progress: Progress) -> None:
        state.write_files()


def count_package_bytes(packages: Sequence[BuildPackage]) -> int:
    """Return the bytes of packages on disk."""
    return sum(package.moves[1] for package in packages)
