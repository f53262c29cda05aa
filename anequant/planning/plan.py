"""What a run would do: every job with its bytes, its peak memory and its time, and what stays in float.

Everything follows from config.json and the shards' headers; no weight is read.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anequant.architectures.spec import ModelSpec
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.source import Source
from anequant.errors import ResourceError, UsageError
from anequant.planning.baseline import base_bytes
from anequant.planning.requirements import check_job
from anequant.planning.skips import Kept, kept_in_float
from anequant.planning.steps import (
    Disk,
    Job,
    disk,
    lowering,
    planned_checkpoint,
    quantizing,
    verifying,
)
from anequant.planning.work import Speed, measure_speed
from anequant.quantization.online import plan_online
from anequant.recipe import Calibration, LowerOptions, Recipe
from anequant.reference.open_float import open_float
from anequant.reference.probe import RANGE_TOKENS, probe_tokens
from anequant.targets.coreml.lowerable import check_lowering


@dataclass(frozen=True)
class Plan:
    """Jobs in their order; `base` are the resident bytes of the imports alone."""

    base: int
    jobs: tuple[Job, ...]
    kept: tuple[Kept, ...]
    disk: Disk

    @property
    def largest(self) -> Job:
        return max(self.jobs, key=lambda job: job.peak)

    def peaks(self) -> dict[str, int]:
        """Of every step."""
        steps = dict.fromkeys(job.step for job in self.jobs)
        return {step: max(job.peak for job in self.jobs if job.step == step) for step in steps}

    def to_dict(self, speed: Speed) -> dict[str, Any]:
        jobs = [
            {
                **{key: value for key, value in vars(job).items() if key != "work"},
                "seconds": speed.seconds(job.work),
            }
            for job in self.jobs
        ]
        return {
            "base_bytes": self.base,
            "peak_bytes": self.largest.peak,
            "peak_job": self.largest.name,
            "peak_bytes_by_step": self.peaks(),
            "seconds": sum(speed.seconds(job.work) for job in self.jobs),
            "disk": {**asdict(self.disk), "total": self.disk.total},
            "jobs": jobs,
            "kept": [asdict(row) for row in self.kept],
        }


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration,
    options: LowerOptions | None,
    base: int,
    max_memory: int | None = None,
) -> Plan:
    """The plan of `quantize`, or with `options` of `convert`; with `max_memory`, in bytes, the one that stays
    within it without changing a byte of the output.

    Raises ResourceError naming the least `max_memory` that works, and what the jobs raise for an impossible
    recipe or lowering, or a tokenizer that packages cannot be checked with.
    """
    if options is not None:
        check_lowering(checkpoint.spec, options, plan_online(checkpoint.spec, recipe))
        if 16 in recipe.widths:
            problem = "recipe key 'bits' is 16, and packages hold palettized weights"
            raise UsageError(problem, remedy="use fewer")
        probe_tokens(checkpoint, RANGE_TOKENS)
    written = planned_checkpoint(checkpoint, recipe)
    jobs = list(quantizing(checkpoint, written, recipe, calibration, base, max_memory))
    kept = kept_in_float(checkpoint, recipe, options)
    if options is not None:
        packages = list(lowering(written, options, base))
        jobs += [*packages, *verifying(checkpoint, written, packages, options, base)]
    return _within(Plan(base, tuple(jobs), kept, disk(jobs)), max_memory)


def lowering_plan(checkpoint: Checkpoint, options: LowerOptions, base: int, max_memory: int | None) -> Plan:
    """The plan of `lower` for a quantized checkpoint; raises as `make_plan`."""
    check_lowering(checkpoint.spec, options, checkpoint.online)
    jobs = tuple(lowering(checkpoint, options, base))
    return _within(Plan(base, jobs, (), disk(jobs)), max_memory)


def base_of(spec: ModelSpec, max_memory: int | None) -> int:
    """`base_bytes` for a job that is about to run: nothing where no limit asks for its peaks."""
    return 0 if max_memory is None else base_bytes(spec)


def _within(plan: Plan, max_memory: int | None) -> Plan:
    job = plan.largest
    if max_memory is not None and job.peak > max_memory:
        least = math.ceil(job.peak / 1e7) / 100
        raise ResourceError(
            f"'{job.name}' needs {job.peak / 1e9:.2f} GB, and --max-memory allows {max_memory / 1e9:.2f} GB",
            remedy=f"the least that works is --max-memory {least:.2f}GB",
        )
    return plan


def plan_source(
    source: Source,
    recipe: Recipe,
    calibration: Calibration,
    options: LowerOptions,
    rotations_file: Path | None,
    max_memory: int | None,
) -> tuple[Plan, Speed]:
    """The plan of `convert` for a float model, and how fast this machine is.

    Raises what `convert` raises before it reads a weight.
    """
    checkpoint = open_float(source)
    check_job(source, checkpoint, recipe, calibration, rotations_file)
    plan = make_plan(checkpoint, recipe, calibration, options, base_bytes(checkpoint.spec), max_memory)
    return plan, measure_speed()
