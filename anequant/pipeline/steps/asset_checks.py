"""What a conversion checks of an asset of Core AI before its output takes its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anequant.jobs.control import Progress
from anequant.jobs.step import NOMINAL, Step, Work
from anequant.pipeline.converting import Converting
from anequant.pipeline.steps.build_asset import BuildAsset
from anequant.pipeline.steps.sizes import (
    FLOAT16,
    FLOAT32,
    Facts,
    count_compared_bytes,
    count_packing_work,
    count_reference_bytes,
    count_table_weights,
)
from anequant.targets.coreai.assemble import read_sizes
from anequant.targets.coreai.lint.lint_bundle import lint_bundle
from anequant.targets.shared.finding import Finding, require_clean
from anequant.verification.assets import AssetCheck, choose_extent, verify_bundle


@dataclass(frozen=True, eq=False)
class VerifyAsset(Step[Converting, AssetCheck]):
    """Read the asset's constants back, and run it beside transformers and, where there are any, packages."""

    stage = "verify"
    kind = "verify asset"
    result = AssetCheck

    facts: Facts
    asset: BuildAsset

    @property
    def title(self) -> str:
        return "asset"

    @property
    def moves(self) -> tuple[int, int]:
        return self.facts.written_size + 2 * self.asset.moves[1], 0

    @property
    def holds(self) -> int:
        """transformers' logits, or a constant and what it is held against; the runtime is another process."""
        spec = self.facts.spec
        largest = max(*spec.linear_weights.values(), count_table_weights(spec))
        return max(count_reference_bytes(spec, FLOAT16), count_compared_bytes(largest) + FLOAT32 * largest)

    @property
    def cost(self) -> Work:
        spec = self.facts.spec
        size = spec.num_layers * spec.layer_weights + count_table_weights(spec)
        running = choose_extent(read_sizes(spec), self.asset.options.ladder).seconds
        return count_packing_work(size) + Work(running * NOMINAL.flops)

    def run(self, state: Converting, progress: Progress) -> AssetCheck:
        packages = None if state.lowered is None else state.packages_folder
        return verify_bundle(state.bundle_folder, state.checkpoint_folder, packages, progress=progress)

    def accept(self, state: Converting, result: AssetCheck) -> None:
        state.asset_check = result

    def tell(self, result: AssetCheck) -> Sequence[str]:
        return (f"arg-max agrees {result.agreement:.1%}",)


@dataclass(frozen=True, eq=False)
class LintAsset(Step[Converting, tuple[Finding, ...]]):
    """Hold the asset's functions to the rules of the Neural Engine."""

    stage = "verify"
    kind = "lint asset"
    result = tuple[Finding, ...]

    facts: Facts
    asset: BuildAsset

    @property
    def moves(self) -> tuple[int, int]:
        return self.asset.moves[1], 0

    def run(self, state: Converting, progress: Progress) -> tuple[Finding, ...]:
        return tuple(require_clean(lint_bundle(state.bundle_folder)))

    def accept(self, state: Converting, result: tuple[Finding, ...]) -> None:
        state.asset_findings = result
