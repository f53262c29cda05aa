"""A float checkpoint becomes a folded and rotated one, still float: the first of QuaRot's two steps."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from anequant.calibration.rotation_choice import check_rotations
from anequant.errors import InputError
from anequant.jobs.control import UNWATCHED, Run
from anequant.jobs.resume import Job, open_job
from anequant.pipeline.plan import keep_rotations, plan_rotating
from anequant.pipeline.quantizing import Quantizing, RotateResult
from anequant.request import Request


def rotate(request: Request, output: Path, run: Run = UNWATCHED) -> RotateResult:
    """Write the folded and rotated model of the request's source in float32 to the new folder `output`.

    Only what the recipe says of rotations is done; restarts and learning measure them by the quantized model
    that the rest of it describes, on the calibration's tokens, as does pca.

    Raises as `quantize`, and InputError for a model that is rotated already.
    """
    if request.rotated_with is not None:
        raise InputError(
            f"'{request.source.folder}' is already rotated",
            remedy="quantize it, or start from the original float checkpoint",
        )
    check_rotations(request.checkpoint.spec, request.recipe, request.rotations)
    plan = plan_rotating(request)
    made = request.fingerprint("rotate")
    job = Job(request.source.folder, output, made, plan.steps, plan.disk.total)
    plain = keep_rotations(request.recipe)
    with open_job(job, run) as journal, ExitStack() as files:
        state = Quantizing(request, plain, journal.output, journal, files, torch.float32)
        for step in plan.steps:
            journal.do(step, state)
        return state.rotate_result
