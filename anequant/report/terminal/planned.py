"""A plan as a table of jobs and the rows below it."""

from __future__ import annotations

from anequant.jobs.step import Speed
from anequant.pipeline.plan import Plan

COLUMNS = ("step", "job", "in", "out", "peak memory", "time, about")


def jobs(plan: Plan, speed: Speed) -> list[tuple[str, ...]]:
    """A row for each job, in the order of COLUMNS."""
    return [
        (
            step.stage,
            step.title,
            _size(step.moves[0]),
            _size(step.moves[1]),
            _size(plan.peak(step)),
            _time(speed.seconds(step.cost)),
        )
        for step in plan.steps
    ]


def summary(plan: Plan, speed: Speed) -> list[tuple[str, str]]:
    peaks = ", ".join(f"{step} {_size(peak)}" for step, peak in plan.peaks().items())
    seconds = sum(speed.seconds(step.cost) for step in plan.steps)
    disk = plan.disk
    rows = [
        ("peak memory", f"{_size(plan.peak(plan.largest))} at '{plan.largest.title}' ({peaks})"),
        (
            "disk",
            f"{_size(disk.total)}: checkpoint {_size(disk.checkpoint)}, packages {_size(disk.packages)}, "
            f"while it runs {_size(disk.temporary)} more",
        ),
        ("time", f"about {_time(seconds)}, an estimate"),
    ]
    kept = [f"{row.what}: {row.form} ({row.reason})" for row in plan.kept]
    labels = ["kept as it is", *[""] * (len(kept) - 1)]
    return [*rows, *zip(labels, kept, strict=True)]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
