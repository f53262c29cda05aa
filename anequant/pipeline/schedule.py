"""Which units of work a job is going to do, and how they compare: the plan's jobs, under their units' names.

Weights are the plan's seconds on a nominal machine. Only their proportions are used, and whoever estimates
the time that is left corrects each kind of unit by how long the first of them took.
"""

from __future__ import annotations

from collections.abc import Iterable

from anequant.checkpoints.reader import Checkpoint
from anequant.pipeline import jobs, memory, work
from anequant.pipeline.jobs import Job
from anequant.pipeline.work import Speed, Work
from anequant.progress import Expected
from anequant.recipe import Calibration, LowerOptions, Recipe

NOMINAL = Speed(flops=6e10, bytes=2e10)
"""One core of a server of 2023."""

CALIBRATION_TOKENS, ROTATING, SENSITIVITY, TUNING = "calibration tokens", "rotations", "bits", "tuning"
RANGES, EMBEDDING_PACKAGE, HEAD_PACKAGE = "ranges", "embedding package", "head package"
VERIFY_CHECKPOINT, VERIFY_PACKAGES, QUALITY = "verify checkpoint", "verify packages", "quality"
REPORT = "report"
REPORT_PASSES = 4

_UNITS = {
    jobs.RESIDENT: CALIBRATION_TOKENS,
    jobs.STREAMED: CALIBRATION_TOKENS,
    "sensitivity": SENSITIVITY,
    jobs.TUNE: TUNING,
}
_CHECKS = {"checkpoint": VERIFY_CHECKPOINT, "packages": VERIFY_PACKAGES}


def quantizing_units(
    checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration, max_memory: int | None
) -> list[Expected]:
    """What `quantize` does with a float model."""
    written = jobs.planned_checkpoint(checkpoint, recipe)
    return _units(jobs.quantizing(checkpoint, written, recipe, calibration, 0, max_memory), checkpoint)


def rotating_units(
    checkpoint: Checkpoint, recipe: Recipe, plain: Recipe, calibration: Calibration
) -> list[Expected]:
    """What `rotate` does; `plain` is the recipe without what it quantizes."""
    units = quantizing_units(checkpoint, plain, calibration, None)
    searching = jobs.quantizing(checkpoint, checkpoint, recipe, calibration, 0, None)
    found = [unit for unit in _units(searching, checkpoint) if unit.name == ROTATING]
    return [found[0] if unit.name == ROTATING else unit for unit in units]


def lowering_units(checkpoint: Checkpoint, options: LowerOptions) -> list[Expected]:
    """What `lower` does with a quantized checkpoint, written or planned."""
    return _units(jobs.lowering(checkpoint, options, 0), checkpoint)


def converting_units(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration,
    options: LowerOptions,
    max_memory: int | None,
) -> list[Expected]:
    """What `convert` does, and the report that the command line writes after it."""
    spec, written = checkpoint.spec, jobs.planned_checkpoint(checkpoint, recipe)
    packages = list(jobs.lowering(written, options, 0))
    checks = list(jobs.verifying(checkpoint, written, packages, options, 0))
    rounding = [work.layer(spec, recipe, None)] * spec.num_layers
    windows = (memory.QUALITY_WINDOWS, memory.QUALITY_LENGTH)
    reporting = sum(rounding, work.forward(spec, windows, REPORT_PASSES))
    return [
        *quantizing_units(checkpoint, recipe, calibration, max_memory),
        *_units([*packages, *checks], checkpoint),
        _unit(REPORT, REPORT, reporting),
    ]


def _units(planned: Iterable[Job], checkpoint: Checkpoint) -> list[Expected]:
    layers, units = checkpoint.spec.num_layers, []
    for job in planned:
        kind, name = job.name, job.name
        if job.step == jobs.QUANTIZE and name.startswith("layer "):
            kind, name = "layer", f"{name} of {layers}"
        elif job.step == jobs.QUANTIZE:
            name = _UNITS.get(name, name)
            kind = "table" if name in ("embedding", "head") else name
        elif job.step == jobs.LOWER:
            kind = "package" if job.bytes_out else name
        else:
            name = kind = _CHECKS.get(name, name)
        units.append(_unit(name, kind, job.work))
    return units


def _unit(name: str, kind: str, todo: Work) -> Expected:
    return Expected(name, kind, NOMINAL.seconds(todo))
