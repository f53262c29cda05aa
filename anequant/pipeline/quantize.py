"""A float checkpoint becomes a quantized one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from anequant.jobs.control import UNWATCHED, Run
from anequant.jobs.journal import Journal
from anequant.jobs.resume import Job, open_job
from anequant.jobs.step import AnyStep, Step
from anequant.pipeline.plan import plan_request
from anequant.pipeline.quantizing import QuantizeResult, Quantizing
from anequant.request import Request


def quantize(
    request: Request, output: Path, run: Run = UNWATCHED, more: Sequence[Step[Quantizing, Any]] = ()
) -> QuantizeResult:
    """Write the quantized checkpoint of the request's source to the new folder `output`.

    A source that is rotated already is not rotated again, and the recipe has to say what it was rotated with.
    `more` are steps that follow before the output takes its name.

    Raises UsageError when `output` exists (without `force`), for a recipe that contradicts the source's
    rotations or when another job was interrupted, InputError or UnsupportedError for a model that cannot be
    read or handled, VerificationError when a check fails; nothing is left behind then. See `open_job` for
    what an interrupt and a full disk leave.
    """
    request.check()
    plan = plan_request(request, run.max_memory)
    steps = (*plan.steps, *more)
    made = request.fingerprint("quantize")
    job = Job(request.source.folder, output, made, steps, plan.disk.total)
    with open_job(job, run) as journal:
        return run_quantizing(request, journal.output, journal, steps)


def run_quantizing(
    request: Request, folder: Path, journal: Journal, steps: Sequence[AnyStep]
) -> QuantizeResult:
    """Do the steps of quantizing a request into a folder of a job's output."""
    with ExitStack() as files:
        state = Quantizing(request, request.recipe, folder, journal, files)
        for step in steps:
            journal.do(step, state)
        return state.result
