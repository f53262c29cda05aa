"""Which units of work a job is going to do, and how they compare: the plan's jobs, under their units' names.

Weights are the plan's seconds on a nominal machine. Only their proportions are used, and whoever estimates
the time that is left corrects each kind of unit by how long the first of them took.
"""

from __future__ import annotations

from collections.abc import Iterable

from anequant.architectures.spec import ModelSpec
from anequant.evaluation import SAMPLE_LENGTH, SAMPLE_WINDOWS
from anequant.jobs.control import Expected
from anequant.planning import steps as jobs
from anequant.planning import work
from anequant.planning.steps import Job
from anequant.planning.work import Speed, Work
from anequant.recipe import Recipe

NOMINAL = Speed(flops=6e10, bytes=2e10)
"""One core of a server of 2023."""

CALIBRATION_TOKENS, SENSITIVITY, TUNING = "calibration tokens", "bits", "tuning"
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


def units_of(planned: Iterable[Job], spec: ModelSpec) -> list[Expected]:
    """The units of a model's planned jobs, in their order."""
    layers, units = spec.num_layers, []
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


def report_unit(spec: ModelSpec, recipe: Recipe) -> Expected:
    """The report that follows a conversion: layers rounded again, and some windows through both models."""
    todo = work.forward(spec, (SAMPLE_WINDOWS, SAMPLE_LENGTH), REPORT_PASSES)
    return _unit(REPORT, REPORT, sum([work.layer(spec, recipe, None)] * spec.num_layers, todo))
