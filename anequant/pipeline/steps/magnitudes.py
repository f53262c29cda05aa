"""The magnitudes inside a quantized model, which packages in float16 have to hold."""

from __future__ import annotations

from dataclasses import dataclass

from anequant.calibration.ranges import LayerRange, measure_ranges
from anequant.checkpoints.reader import Checkpoint
from anequant.jobs.control import Progress
from anequant.jobs.step import Step, Work
from anequant.pipeline.asset_lowering import AssetLowering
from anequant.pipeline.lowering import Lowering
from anequant.pipeline.steps.sizes import (
    FLOAT16,
    FLOAT32,
    PACKING_PASSES,
    count_stored_bytes,
    count_table_weights,
)
from anequant.reference.windows import RANGE_TOKENS, choose_probe_tokens
from anequant.targets.shared.headroom import plan_headroom


@dataclass(frozen=True, eq=False)
class MeasureRanges(Step[Lowering | AssetLowering, tuple[LayerRange, ...]]):
    """Look at the magnitudes of a few tokens in every layer; `written` is quantized, or will be."""

    stage = "lower"
    kind = "ranges"
    result = tuple[LayerRange, ...]

    written: Checkpoint

    @property
    def moves(self) -> tuple[int, int]:
        return count_stored_bytes(self.written, "model.layers."), 0

    @property
    def holds(self) -> int:
        """A layer in float32, its codes, and of a linear its code numbers and entries; or the embedding."""
        spec = self.written.spec
        largest = max(spec.linear_weights.values())
        running = max((FLOAT16 + FLOAT32) * largest, 2 * FLOAT32 * largest)
        return max(FLOAT16 * count_table_weights(spec), (FLOAT32 + 1) * spec.layer_weights + running)

    @property
    def cost(self) -> Work:
        size = self.written.spec.num_layers * self.written.spec.layer_weights
        return Work(2 * 4 * RANGE_TOKENS * size, 4 * PACKING_PASSES * size)

    def run(self, state: Lowering | AssetLowering, progress: Progress) -> tuple[LayerRange, ...]:
        tokens = choose_probe_tokens(state.checkpoint, RANGE_TOKENS)[None]
        return tuple(measure_ranges(state.checkpoint, tokens))

    def accept(self, state: Lowering | AssetLowering, result: tuple[LayerRange, ...]) -> None:
        state.headroom = plan_headroom(list(result))
