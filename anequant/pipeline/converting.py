"""A conversion after its packages are written: what the steps that check and measure it share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anequant.checkpoints.places import BUNDLE_FOLDER, CHECKPOINT_FOLDER, PACKAGES_FOLDER
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.evaluation import SAMPLE_LENGTH, SAMPLE_WINDOWS
from anequant.evaluation.divergence import measure_quality
from anequant.evaluation.quality import Quality
from anequant.jobs.control import Progress
from anequant.pipeline.asset_lowering import AssetResult
from anequant.pipeline.lowering import LowerResult
from anequant.pipeline.quantizing import QuantizeResult
from anequant.reference.windows import read_text_windows
from anequant.request import Request
from anequant.targets.shared.agreement import PackageCheck
from anequant.targets.shared.finding import Finding
from anequant.verification.assets import AssetCheck
from anequant.verification.verify import CheckpointCheck


@dataclass(frozen=True)
class ConvertResult:
    """What was written and measured; `quality` is None for a model that comes without a tokenizer, `lowered`
    and `packages` where Core ML was not asked for, `lowered_asset` and `asset` where Core AI was not."""

    quantized: QuantizeResult
    lowered: LowerResult | None
    lowered_asset: AssetResult | None
    checkpoint: CheckpointCheck
    packages: PackageCheck | None
    asset: AssetCheck | None
    lint: tuple[Finding, ...]
    quality: Quality | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "quantized": self.quantized.to_dict(),
            "lowered": _plain(self.lowered),
            "lowered_asset": _plain(self.lowered_asset),
            "verified": {
                "checkpoint": self.checkpoint.to_dict(),
                "packages": _plain(self.packages),
                "asset": _plain(self.asset),
            },
            "lint": [asdict(finding) for finding in self.lint],
            "quality": None if self.quality is None else self.quality.to_dict(),
        }


@dataclass(eq=False)
class Converting:
    """What the steps after quantizing and lowering find of the output in `folder`."""

    request: Request
    folder: Path
    quantized: QuantizeResult
    lowered: LowerResult | None
    lowered_asset: AssetResult | None
    checkpoint: CheckpointCheck | None = None
    packages: PackageCheck | None = None
    asset_check: AssetCheck | None = None
    findings: tuple[Finding, ...] = ()
    asset_findings: tuple[Finding, ...] = ()
    quality: Quality | None = None

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / CHECKPOINT_FOLDER

    @property
    def packages_folder(self) -> Path:
        return self.folder / PACKAGES_FOLDER

    @property
    def bundle_folder(self) -> Path:
        return self.folder / BUNDLE_FOLDER

    @property
    def result(self) -> ConvertResult:
        """All of it, once the steps are done."""
        assert self.checkpoint is not None
        return ConvertResult(
            self.quantized,
            self.lowered,
            self.lowered_asset,
            self.checkpoint,
            self.packages,
            self.asset_check,
            self.findings + self.asset_findings,
            self.quality,
        )


def _plain(result: LowerResult | AssetResult | PackageCheck | AssetCheck | None) -> dict[str, Any] | None:
    return None if result is None else result.to_dict()


def measure_sample(original: Checkpoint, checkpoint: Path, progress: Progress) -> Quality:
    """Measure a checkpoint against its float model, which has a tokenizer, on the bundled text."""
    config = original.spec.config
    tokens = read_text_windows(original.folder, config, count=SAMPLE_WINDOWS, length=SAMPLE_LENGTH)
    return measure_quality(open_checkpoint(checkpoint), tokens, original, progress=progress)
