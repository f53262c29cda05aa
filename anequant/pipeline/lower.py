"""A quantized checkpoint becomes Core ML packages, or an asset of Core AI, with few layers in memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from anequant.jobs.control import UNWATCHED, Run
from anequant.jobs.journal import Journal
from anequant.jobs.resume import Job, open_job
from anequant.jobs.step import AnyStep
from anequant.lower_options import AssetOptions
from anequant.pipeline.asset_lowering import AssetResult, run_asset_lowering
from anequant.pipeline.lowering import Lowering, LowerResult
from anequant.pipeline.lowering_steps import count_chunks
from anequant.pipeline.plan import plan_lowering
from anequant.request import LowerRequest


def lower(request: LowerRequest, output: Path, run: Run = UNWATCHED) -> LowerResult | AssetResult:
    """Write what a quantized checkpoint is lowered to into the new folder `output`.

    Raises UsageError when `output` exists (without `force`), a size is impossible or another job was
    interrupted, InputError for a checkpoint that is not quantized or breaks the contract, UnsupportedError
    for what cannot be lowered. See `open_job` for what an interrupt and a full disk leave.
    """
    request.check()
    plan = plan_lowering(request, run.max_memory)
    job = Job(request.folder, output, request.fingerprint(), plan.steps, plan.disk.total)
    with open_job(job, run) as journal:
        if isinstance(request.lowering, AssetOptions):
            return run_asset_lowering(request, journal.output, journal, plan.steps)
        return run_lowering(request, journal.output, journal, plan.steps)


def run_lowering(
    request: LowerRequest, folder: Path, journal: Journal, steps: Sequence[AnyStep]
) -> LowerResult:
    """Do the steps of lowering a request to packages into a folder of a job's output."""
    with ExitStack() as files:
        state = Lowering(request, count_chunks(steps), folder, journal, files)
        for step in steps:
            journal.do(step, state)
        return state.result
