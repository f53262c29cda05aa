"""An asset of Core AI, and the bundle around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anequant.architectures.spec import EMBEDDING, HEAD
from anequant.checkpoints.reader import Checkpoint
from anequant.jobs.control import Progress
from anequant.jobs.step import Step, Work
from anequant.lower_options import AssetOptions
from anequant.pipeline.asset_lowering import AssetLowering
from anequant.pipeline.steps.sizes import (
    FLOAT32,
    count_packed_bytes,
    count_packing_work,
    count_stored_bytes,
    count_table_weights,
)
from anequant.quantization.linear import ROWS
from anequant.targets.coreai.assemble import AssetSize
from anequant.targets.coreai.asset_sizes import count_asset_bytes


@dataclass(frozen=True, eq=False)
class BuildAsset(Step[AssetLowering, AssetSize]):
    """Write the asset; `written` is quantized, or will be."""

    stage = "asset"
    kind = "asset"
    result = AssetSize

    written: Checkpoint
    options: AssetOptions

    @property
    def moves(self) -> tuple[int, int]:
        return count_stored_bytes(self.written, "model.", "lm_head."), count_asset_bytes(
            self.written, self.options
        )

    @property
    def holds(self) -> int:
        """The largest layer's codes, or those of a table, or rows of one that is not quantized."""
        spec = self.written.spec
        tables = [name for name in (EMBEDDING, HEAD) if f"{name}.codebook" in self.written.tensors]
        table = count_packed_bytes([count_table_weights(spec)]) if tables else 0
        rows = ROWS * FLOAT32 * spec.hidden_size
        return max(count_packed_bytes(list(spec.linear_weights.values())), table, rows)

    @property
    def cost(self) -> Work:
        spec = self.written.spec
        return count_packing_work(spec.num_layers * spec.layer_weights + 2 * count_table_weights(spec))

    def run(self, state: AssetLowering, progress: Progress) -> AssetSize:
        return state.build(progress)

    def accept(self, state: AssetLowering, result: AssetSize) -> None:
        state.size = result

    def tell(self, result: AssetSize) -> Sequence[str]:
        return (f"{(result.constant_bytes + result.graph_bytes) / 1e6:.1f} MB",)


@dataclass(frozen=True, eq=False)
class WriteBundleFiles(Step[AssetLowering, None]):
    """Write metadata.json, the tokenizer and the manifest beside the asset, which is hashed."""

    stage = "asset"
    kind = "bundle files"

    asset: BuildAsset

    @property
    def moves(self) -> tuple[int, int]:
        return self.asset.moves[1], 0

    def run(self, state: AssetLowering, progress: Progress) -> None:
        state.write_files()
