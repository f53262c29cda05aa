"""The whole job: quantize, lower, verify, measure; the output folder appears when all of it holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anequant.calibration.text import load_tokenizer, read_text, start_token, text_windows
from anequant.checkpoints.manifest import MANIFEST, manifest
from anequant.checkpoints.output import check_output, file_hashes, staged_folder
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT, Source, has_tokenizer
from anequant.checkpoints.writer import write_json
from anequant.coreml.lint import Finding
from anequant.errors import UsageError
from anequant.evaluation.divergence import Quality, evaluate
from anequant.pipeline.folders import CHECKPOINT_FOLDER, PACKAGES_FOLDER
from anequant.pipeline.lint import lint, require_clean
from anequant.pipeline.lower import LowerResult, lower_into
from anequant.pipeline.lowerable import check_lowering
from anequant.pipeline.quantize import QuantizeResult, quantize_into
from anequant.pipeline.verify import (
    CheckpointCheck,
    PackageCheck,
    verify_checkpoint,
    verify_packages,
)
from anequant.progress import Progress, part_of, silent
from anequant.quantization.online import plan_online
from anequant.recipe import Calibration, LowerOptions, Recipe

SAMPLE_WINDOWS, SAMPLE_LENGTH = 4, 256


@dataclass(frozen=True)
class ConvertResult:
    """What was written and measured; `quality` is None for a model that comes without a tokenizer."""

    quantized: QuantizeResult
    lowered: LowerResult
    checkpoint: CheckpointCheck
    packages: PackageCheck
    lint: tuple[Finding, ...]
    quality: Quality | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "quantized": self.quantized.to_dict(),
            "lowered": self.lowered.to_dict(),
            "verified": {"checkpoint": self.checkpoint.to_dict(), "packages": self.packages.to_dict()},
            "lint": [asdict(finding) for finding in self.lint],
            "quality": None if self.quality is None else self.quality.to_dict(),
        }


def convert(
    source: Source,
    output: Path,
    recipe: Recipe,
    calibration: Calibration,
    options: LowerOptions,
    rotations_file: Path | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> ConvertResult:
    """Write `output`/checkpoint and `output`/packages, verified. Raises what its steps raise."""
    check_output(output, force=force, source=source.folder)
    spec = open_checkpoint(source.folder).spec
    check_lowering(spec, options, plan_online(spec, recipe))
    if 16 in recipe.widths:
        raise UsageError("recipe key 'bits' is 16, and packages hold palettized weights", remedy="use fewer")
    with staged_folder(output, force=force, source=source.folder) as staging:
        checkpoint, packages = staging / CHECKPOINT_FOLDER, staging / PACKAGES_FOLDER
        checkpoint.mkdir()
        packages.mkdir()
        quantizing = part_of(progress, "quantize", 0.0, 0.4)
        quantized = quantize_into(checkpoint, source, recipe, calibration, quantizing, rotations_file)
        lowered = lower_into(packages, checkpoint, source.name, options, part_of(progress, "lower", 0.4, 0.5))
        result = ConvertResult(
            quantized,
            lowered,
            verify_checkpoint(checkpoint, progress=part_of(progress, "verify", 0.5, 0.55)),
            verify_packages(packages, checkpoint, progress=part_of(progress, "verify", 0.55, 0.8)),
            tuple(require_clean(lint(packages))),
            sample_quality(source.folder, checkpoint, part_of(progress, "measure", 0.8, 1.0)),
        )
        contents = {"recipe": recipe.to_dict(), "measured": result.to_dict(), "files": file_hashes(staging)}
        write_json(staging / MANIFEST, manifest("conversion", contents))
    return result


def sample_quality(base: Path, checkpoint: Path, progress: Progress) -> Quality | None:
    """Quality against the float model on the bundled text; None without a tokenizer."""
    if not has_tokenizer(base):
        return None
    original = open_checkpoint(base)
    tokenizer = load_tokenizer(base)
    tokens = text_windows(
        read_text(SAMPLE_TEXT),
        tokenizer,
        start_token(tokenizer, original.spec.config),
        count=SAMPLE_WINDOWS,
        length=SAMPLE_LENGTH,
    )
    return evaluate(open_checkpoint(checkpoint), tokens, original, progress=progress)
