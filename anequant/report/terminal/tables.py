"""What `plan`, `batch` and `compare` end with: a table, and rows of (label, text) below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.comparison.trials import MEMORY_MISSING
from anequant.report.terminal.quality_rows import (
    PERCENTILES,
    describe_noise,
    describe_percentiles,
    format_mean,
    format_share,
    list_percentiles,
)
from anequant.units import NOTHING, format_bytes, format_estimate

if TYPE_CHECKING:
    from anequant.comparison.batch import Row
    from anequant.comparison.trials import Comparison, Trial
    from anequant.jobs.step import Speed
    from anequant.pipeline.plan import Plan

PLAN_COLUMNS = ("step", "job", "in", "out", "peak memory", "time, about")
BATCH_COLUMNS = ("job", "recipe", "model", "bits/weight", "size", "NLL", "KL", "seconds", "state")
COMPARISON_COLUMNS = (
    *("recipe", "front", "bits/weight", "projections", "size", "extra NLL", "KL", "top token", "verdict"),
    "seconds",
)
SPREAD_COLUMNS = ("recipe", *PERCENTILES, "KL difference", "95% interval", "verdict")
FRONT, OFF_ANE = "*", "off the ANE"
REFERENCE = "reference"
"""The verdict on the trial that the others are compared with."""


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
    return Table(PLAN_COLUMNS, lines, [*rows, *_label("kept as it is", kept), *_label("advice", plan.advice)])


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
    """Make a line for each trial; below it what the numbers were measured on, how KL is spread and differs,
    and what is not among them."""
    failures = [("not run", f"{trial.name}: {trial.failed}") for trial in result.trials if trial.failed]
    lines = [_trial_line(trial, result.trials[0]) for trial in result.trials]
    return Table(COMPARISON_COLUMNS, lines, list_conditions(result) + _list_spread(result) + failures)


def tabulate_spread(result: Comparison) -> Table:
    """Make a line for each trial that was run, of how KL is spread over predictions and of its difference
    from the first one."""
    lines = []
    for trial in result.trials:
        if trial.quality is not None and trial.quality.kl_percentiles is not None:
            percentiles = list_percentiles(trial.quality.kl_percentiles)
            difference, interval = _describe_difference(trial)
            verdict = _judge(trial, result.trials[0])
            lines.append((trial.name, *percentiles, difference, interval, verdict))
    return Table(SPREAD_COLUMNS, lines, [])


def _list_spread(result: Comparison) -> list[tuple[str, str]]:
    """Return the spread of KL of every trial, and its difference from the first one."""
    spread, differences, first = [], [], result.trials[0]
    for trial in result.trials:
        if trial.quality is not None and trial.quality.kl_percentiles is not None:
            spread.append(f"{trial.name}: {describe_percentiles(trial.quality.kl_percentiles)}")
        if trial.difference is not None:
            difference, interval = _describe_difference(trial)
            told = f"KL {difference} from {first.name}, 95% interval {interval}"
            differences.append(f"{trial.name}: {trial.difference.verdict}, {told}")
    if first.failed is not None and spread:
        differences = [f"not told: '{first.name}', which others are compared with, was not run"]
    return [*_label("KL of tokens", spread), *_label("difference", differences)]


def _label(label: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return a row for each text, of which the first one has the label."""
    return [(label if number == 0 else "", text) for number, text in enumerate(texts)]


def _describe_difference(trial: Trial) -> tuple[str, str]:
    """Return the difference of KL with its standard error, and its interval."""
    if trial.difference is None:
        return NOTHING, NOTHING
    kl = trial.difference.kl
    told = format_mean(kl, sign="+")
    if kl.interval is None:
        return told, NOTHING
    decimals = len(told.split()[0].partition(".")[2])
    return told, " to ".join(f"{end:+.{decimals}f}" for end in kl.interval)


def _judge(trial: Trial, reference: Trial) -> str:
    if trial is reference:
        return REFERENCE
    return NOTHING if trial.difference is None else trial.difference.verdict


def _trial_line(trial: Trial, reference: Trial) -> tuple[str, ...]:
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
        format_mean(quality.extra_nll_mean, sign="+"),
        format_mean(quality.kl_mean),
        format_share(quality.top1_mean),
        _judge(trial, reference),
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
    return [*rows, describe_noise(result.noise), ("peak memory", f"not told: {MEMORY_MISSING}")]
