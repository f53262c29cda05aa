"""The whole job: quantize, lower, verify, measure; the output folder appears when all of it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from anequant.checkpoints.manifest import write_manifest
from anequant.checkpoints.places import CHECKPOINT_FOLDER, PACKAGES_FOLDER
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT, Source, has_tokenizer
from anequant.evaluation.divergence import Quality, evaluate
from anequant.evaluation.sample_size import SAMPLE_LENGTH, SAMPLE_WINDOWS
from anequant.jobs.control import CONTROL, Control, Progress, silent, step_of
from anequant.jobs.journal import Journal
from anequant.jobs.resume import resumable
from anequant.jobs.work_folder import check_target
from anequant.outputs.card import Asked, write_conversion_card
from anequant.pipeline.fingerprint import fingerprint
from anequant.pipeline.lower import LowerResult, lower_into
from anequant.pipeline.quantize import QuantizeResult, quantize_into
from anequant.planning.plan import base_of, make_plan
from anequant.planning.requirements import check_job
from anequant.planning.schedule import (
    QUALITY,
    REPORT,
    VERIFY_CHECKPOINT,
    VERIFY_PACKAGES,
    report_unit,
    units_of,
)
from anequant.recipe import Calibration, LowerOptions, Recipe
from anequant.reference.open_float import open_float
from anequant.reference.windows import load_tokenizer, model_windows, read_text
from anequant.targets.coreml.lint.lint import Finding, lint, require_clean
from anequant.targets.shared.agreement import PackageCheck
from anequant.verification.verify import (
    CheckpointCheck,
    verify_checkpoint,
    verify_packages,
)


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
    control: Control = CONTROL,
    collected: Tensor | None = None,
    report: Callable[[Path, Progress], None] | None = None,
) -> ConvertResult:
    """Write `output`/checkpoint and `output`/packages, verified. Raises what its steps raise.

    `collected` are the tokens of `calibration` where somebody has them already; `report` adds to the finished
    folder before it takes its name.
    """
    check_target(output, force=force, source=source.folder)
    original = open_float(source)
    check_job(source, original, recipe, calibration, rotations_file)
    spec = original.spec
    base = base_of(spec, control.max_memory)
    plan = make_plan(original, recipe, calibration, options, base, control.max_memory)
    with resumable(
        output,
        fingerprint("convert", original, source.name, recipe, calibration, rotations_file, options),
        needed=plan.disk.total,
        force=force,
        source=source.folder,
        control=control,
        units=[*units_of(plan.jobs, spec), *([report_unit(spec, recipe)] if report else [])],
    ) as journal:
        result = _convert_into(
            journal.output,
            source,
            recipe,
            calibration,
            options,
            rotations_file,
            progress,
            journal,
            collected,
        )
        if report is not None:
            reporting = partial(report, journal.output, journal.part(progress, REPORT, REPORT))
            journal.unit(REPORT, reporting)
        return result


def _convert_into(
    folder: Path,
    source: Source,
    recipe: Recipe,
    calibration: Calibration,
    options: LowerOptions,
    rotations_file: Path | None,
    progress: Progress,
    journal: Journal,
    collected: Tensor | None,
) -> ConvertResult:
    checkpoint, packages = folder / CHECKPOINT_FOLDER, folder / PACKAGES_FOLDER
    for made in (checkpoint, packages):
        made.mkdir(exist_ok=True)
    step = step_of(progress, "quantize")
    quantized = quantize_into(
        checkpoint, source, recipe, calibration, step, journal, rotations_file, collected
    )
    step = step_of(progress, "lower")
    lowered = lower_into(packages, checkpoint, source.name, options, step, journal)
    checking = journal.part(progress, "verify", VERIFY_CHECKPOINT)
    first = journal.unit(
        VERIFY_CHECKPOINT,
        lambda: asdict(verify_checkpoint(checkpoint, progress=checking)),
        lambda check: [f"{check['tensors']} weights as stored"],
    )
    verifying = journal.part(progress, "verify", VERIFY_PACKAGES)
    second = journal.unit(
        VERIFY_PACKAGES,
        lambda: asdict(verify_packages(packages, checkpoint, progress=verifying)),
        lambda check: [f"arg-max agrees {check['agreement']:.1%}"],
    )
    progress("lint", journal.share("lint")[0])
    findings = journal.unit("lint", lambda: [asdict(finding) for finding in require_clean(lint(packages))])
    measuring = journal.part(progress, "measure", QUALITY)

    def measure() -> dict[str, Any] | None:
        quality = sample_quality(source.folder, checkpoint, measuring)
        return None if quality is None else asdict(quality)

    quality = journal.unit(QUALITY, measure, _measured)
    result = ConvertResult(
        quantized,
        lowered,
        CheckpointCheck(**first),
        PackageCheck(**second),
        tuple(Finding(**finding) for finding in findings),
        None if quality is None else Quality(**quality),
    )

    def write_files() -> None:
        asked = Asked(source, recipe, calibration)
        write_conversion_card(folder, asked, options, result.packages, result.quality)
        write_manifest(folder, "conversion", {"recipe": recipe.to_dict(), "measured": result.to_dict()})

    journal.unit("conversion files", write_files)
    return result


def _measured(quality: Mapping[str, float] | None) -> tuple[str, ...]:
    if quality is None:
        return ("not measured",)
    return f"KL {quality['kl']:.4f}", f"top token {quality['top1']:.1%}"


def sample_quality(base: Path, checkpoint: Path, progress: Progress) -> Quality | None:
    """Quality against the float model on the bundled text; None without a tokenizer."""
    if not has_tokenizer(base):
        return None
    original = open_checkpoint(base)
    tokenizer, text = load_tokenizer(base), read_text(SAMPLE_TEXT)
    tokens = model_windows(tokenizer, original.spec.config, text, count=SAMPLE_WINDOWS, length=SAMPLE_LENGTH)
    return evaluate(open_checkpoint(checkpoint), tokens, original, progress=progress)
