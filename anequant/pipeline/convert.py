"""The whole job: quantize, lower, verify, measure; the output folder appears when all of it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anequant.checkpoints.places import BUNDLE_FOLDER, CHECKPOINT_FOLDER, PACKAGES_FOLDER
from anequant.jobs.control import UNWATCHED, Run
from anequant.jobs.resume import Job, open_job
from anequant.jobs.step import Step
from anequant.jobs.work_folder import check_target
from anequant.pipeline.asset_lowering import run_asset_lowering
from anequant.pipeline.converting import Converting, ConvertResult
from anequant.pipeline.lower import run_lowering
from anequant.pipeline.plan import plan_request
from anequant.pipeline.quantize import run_quantizing
from anequant.request import LowerRequest, Request


def convert(
    request: Request, output: Path, run: Run = UNWATCHED, more: Sequence[Step[Converting, Any]] = ()
) -> ConvertResult:
    """Write `output`/checkpoint and, as far as they are asked for, `output`/packages and `output`/coreai, all
    verified. Raises what its steps raise.

    `more` are steps that follow before the output takes its name.
    """
    check_target(output, force=run.force, source=request.source.folder)
    request.check()
    plan = plan_request(request, run.max_memory)
    steps = (*plan.steps, *more)
    made = request.fingerprint("convert")
    job = Job(request.source.folder, output, made, steps, plan.disk.total)
    with open_job(job, run) as journal:
        folder = journal.output
        checkpoint = _make_folder(folder / CHECKPOINT_FOLDER)
        quantized = run_quantizing(request, checkpoint, journal, plan.stage("quantize"))
        lowered, asset, ranges = None, None, plan.stage("lower")
        if request.lowering is not None:
            lowering = LowerRequest(checkpoint, request.lowering, request.source.name)
            packages = _make_folder(folder / PACKAGES_FOLDER)
            lowered, ranges = run_lowering(lowering, packages, journal, ranges), ()
        if request.asset is not None:
            lowering = LowerRequest(checkpoint, request.asset, request.source.name)
            bundle, own = _make_folder(folder / BUNDLE_FOLDER), (*ranges, *plan.stage("asset"))
            headroom = None if lowered is None else lowered.headroom
            asset = run_asset_lowering(lowering, bundle, journal, own, headroom)
        state = Converting(request, folder, quantized, lowered, asset)
        for step in (*plan.stage("verify"), *more):
            journal.do(step, state)
        return state.result


def _make_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
