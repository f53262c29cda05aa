"""A plan as a table of jobs and the rows below it."""

from __future__ import annotations

from anequant.planning.plan import Plan
from anequant.planning.work import Speed
from anequant.units import format_bytes, format_estimate

COLUMNS = ("step", "job", "in", "out", "peak memory", "time, about")


def jobs(plan: Plan, speed: Speed) -> list[tuple[str, ...]]:
    """A row for each job, in the order of COLUMNS."""
    return [
        (
            job.step,
            job.name,
            format_bytes(job.bytes_in),
            format_bytes(job.bytes_out),
            format_bytes(job.peak),
            format_estimate(speed.seconds(job.work)),
        )
        for job in plan.jobs
    ]


def summary(plan: Plan, speed: Speed) -> list[tuple[str, str]]:
    peaks = ", ".join(f"{step} {format_bytes(peak)}" for step, peak in plan.peaks().items())
    seconds = sum(speed.seconds(job.work) for job in plan.jobs)
    disk = plan.disk
    rows = [
        ("peak memory", f"{format_bytes(plan.largest.peak)} at '{plan.largest.name}' ({peaks})"),
        (
            "disk",
            f"{format_bytes(disk.total)}: checkpoint {format_bytes(disk.checkpoint)}, packages "
            f"{format_bytes(disk.packages)}, while it runs {format_bytes(disk.temporary)} more",
        ),
        ("time", f"about {format_estimate(seconds)}, an estimate"),
    ]
    kept = [f"{row.what}: {row.form} ({row.reason})" for row in plan.kept]
    labels = ["kept as it is", *[""] * (len(kept) - 1)]
    return [*rows, *zip(labels, kept, strict=True)]
