"""What `plan`, `batch` and `compare` end with: a table, and rows of (label, text) below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.comparison.trials import MEMORY_MISSING
from anequant.units import NOTHING, format_bytes, format_estimate

if TYPE_CHECKING:
    from anequant.comparison.batch import Row
    from anequant.comparison.trials import Comparison, Trial
    from anequant.jobs.step import Speed
    from anequant.pipeline.plan import Plan

PLAN_COLUMNS = ("step", "job", "in", "out", "peak memory", "time, about")
BATCH_COLUMNS = ("job", "recipe", "model", "bits/weight", "size", "NLL", "KL", "seconds", "state")
COMPARISON_COLUMNS = (
    *("recipe", "front", "bits/weight", "projections", "size", "extra NLL", "KL", "top token", "seconds"),
)
FRONT, OFF_ANE = "*", "off the ANE"


@dataclass(frozen=True)
class Table:
    """Every line has a cell for each column; the first two columns are words, the others numbers."""

    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    rows: Sequence[tuple[str, str]]


def tabulate_plan(plan: Plan, speed: Speed) -> Table:
    """Make a line for each job; below it what the whole takes, and which tensors stay as they are."""
    lines = [
        (
            step.stage,
            step.title,
            format_bytes(step.moves[0]),
            format_bytes(step.moves[1]),
            format_bytes(plan.peak(step)),
            format_estimate(speed.seconds(step.cost)),
        )
        for step in plan.steps
    ]
    peaks = ", ".join(f"{stage} {format_bytes(peak)}" for stage, peak in plan.peaks().items())
    disk, largest = plan.disk, plan.largest
    seconds = sum(speed.seconds(step.cost) for step in plan.steps)
    parts = f"checkpoint {format_bytes(disk.checkpoint)}, packages {format_bytes(disk.packages)}"
    rows = [
        ("peak memory", f"{format_bytes(plan.peak(largest))} at '{largest.title}' ({peaks})"),
        (
            "disk",
            f"{format_bytes(disk.total)}: {parts}, while it runs {format_bytes(disk.temporary)} more",
        ),
        ("time", f"about {format_estimate(seconds)}, an estimate"),
    ]
    kept = [f"{row.what}: {row.form} ({row.reason})" for row in plan.kept]
    labels = ["kept as it is", *[""] * (len(kept) - 1)]
    return Table(PLAN_COLUMNS, lines, [*rows, *zip(labels, kept, strict=True)])


def tabulate_batch(jobs: Sequence[Row]) -> Table:
    """Make a line for each job; below it why jobs failed."""
    failures = [("failed", f"{job.name}: {job.failed}") for job in jobs if job.failed]
    return Table(BATCH_COLUMNS, [_batch_line(job) for job in jobs], failures)


def _batch_line(job: Row) -> tuple[str, ...]:
    quality = job.quality or {}
    return (
        job.name,
        job.recipe,
        job.model,
        NOTHING if job.bits is None else f"{job.bits.whole:.2f}",
        format_bytes(None if job.bits is None else job.bits.nbytes),
        *(f"{quality[key]:.4f}" if key in quality else NOTHING for key in ("nll", "kl")),
        NOTHING if job.seconds is None else f"{job.seconds:.1f}",
        job.state,
    )


def tabulate_comparison(result: Comparison) -> Table:
    """Make a line for each trial; below it what the numbers were measured on, and what is not among them."""
    failures = [("not run", f"{trial.name}: {trial.failed}") for trial in result.trials if trial.failed]
    lines = [_trial_line(trial) for trial in result.trials]
    return Table(COMPARISON_COLUMNS, lines, list_conditions(result) + failures)


def _trial_line(trial: Trial) -> tuple[str, ...]:
    front = FRONT if trial.front else "" if trial.on_ane else OFF_ANE
    bits, quality, seconds = trial.bits, trial.quality, trial.seconds
    if bits is None or quality is None or seconds is None:
        return (trial.name, front, *[NOTHING] * (len(COMPARISON_COLUMNS) - 2))
    return (
        trial.name,
        front,
        f"{bits.whole:.2f}",
        f"{bits.projections:.2f}",
        format_bytes(bits.nbytes),
        f"{quality.extra_nll:+.4f}",
        f"{quality.kl:.4f}",
        f"{quality.top1:.1%}",
        f"{seconds:.1f}",
    )


def list_conditions(result: Comparison) -> list[tuple[str, str]]:
    """Return what the numbers of a comparison were measured on, as rows of (label, text)."""
    base, seen = result.base, result.calibration
    rows = [
        ("float model", f"{result.model}, perplexity {base.perplexity:.3f}"),
        ("text", f"{base.windows} windows of {result.length} tokens of {result.text}"),
    ]
    if result.text == SAMPLE_TEXT.name:
        rows.append(("", "it is too short to rank recipes that are close: name a longer one with --text"))
    if seen is not None:
        rows.append(
            ("calibration", f"{seen['windows']} windows of {seen['length']} tokens of {seen['source']}")
        )
    return [*rows, ("peak memory", f"not told: {MEMORY_MISSING}")]
