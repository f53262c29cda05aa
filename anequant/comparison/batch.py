"""Many models and recipes, one after the other: what fails is a row that says why, and the others go on.

`batch.json` in the output folder keeps the fingerprint of every job, written before the job begins where
there is no output yet, else when it is done. So an output is known as that of a job by its fingerprint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from anequant.checkpoints.manifest import load_recipe_for, read_manifest
from anequant.checkpoints.places import CHECKPOINT_FOLDER
from anequant.checkpoints.reader import open_checkpoint, read_json
from anequant.checkpoints.source import resolve_source
from anequant.checkpoints.stored_bits import StoredBits, measure_stored_bits
from anequant.checkpoints.writer import write_json
from anequant.comparison.batch_file import Batch, BatchJob
from anequant.errors import AnequantError, InputError, Interrupted, UsageError, as_error, torch_memory
from anequant.jobs.control import Run
from anequant.jobs.journal import find_difference
from anequant.jobs.typed import to_plain
from anequant.jobs.work_folder import WorkFolder, check_target
from anequant.pipeline.quantize import quantize
from anequant.pipeline.steps.collect_tokens import TOKENS_FILE, collect_tokens
from anequant.recipe import Calibration
from anequant.request import Request

STATE = "batch.json"
DONE, TAKEN_OVER, FAILED = "done", "taken over", "failed"


@dataclass(frozen=True)
class Row:
    """What became of a job. `seconds` are those of the run that did it; what is not known is None.

    `quality` is the conversion's, as its anequant.json has it; `failed` says why a job failed, with the exit
    code of its error.
    """

    name: str
    model: str
    recipe: str
    state: str
    bits: StoredBits | None = None
    quality: Mapping[str, Any] | None = None
    seconds: float | None = None
    failed: str | None = None
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Begin = Callable[[str], AbstractContextManager[Run]]
"""Begins to watch a job, by its name."""

Convert = Callable[[Request, Path, Run], object]
"""`convert`, or what does more and takes the same."""


def run_batch(
    batch: Batch, begin: Begin, convert: Convert, note: Callable[[str], None], *, force: bool = False
) -> list[Row]:
    """Do the jobs that are not done; with `force` also those whose output was made in another way.

    `note` gets a line for each. Raises UsageError or InputError when the output folder or its batch.json is
    none, and Interrupted; whatever else goes wrong is a Row.
    """
    runner = _Runner(batch, begin, convert, force)
    rows = []
    for job in batch.jobs:
        row = runner.row(job)
        note(f"{job.name}: {row.state}{f', {row.failed}' if row.failed else ''}")
        rows.append(row)
    return rows


def exit_code(rows: list[Row]) -> int:
    """Return the exit code of the first failure, 0 when all is done."""
    return next((row.exit_code for row in rows if row.exit_code), 0)


class _Runner:
    """What jobs share: the records of those that are done, and calibration tokens by model."""

    def __init__(self, batch: Batch, begin: Begin, convert: Convert, force: bool) -> None:
        self._batch = batch
        self._begin = begin
        self._convert = convert
        self._force = force
        self._tokens: dict[tuple[Path, Calibration], Tensor] = {}
        try:
            batch.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"output '{batch.output}' cannot be created: {error.strerror}") from error
        self._file = batch.output / STATE
        self._records: dict[str, Any] = _read_records(self._file) if self._file.exists() else {}

    def row(self, job: BatchJob) -> Row:
        try:
            with torch_memory():
                return self._do(job)
        except Interrupted as stop:
            raise Interrupted(stop.kept) from stop
        except KeyboardInterrupt as stop:
            raise Interrupted(f"'{job.name}' was not begun, the jobs before it are done") from stop
        except (AnequantError, MemoryError, OSError) as failure:
            error = as_error(failure)
            code = error.exit_code
            return Row(job.name, job.model, job.recipe, FAILED, failed=str(error), exit_code=code)

    def _do(self, job: BatchJob) -> Row:
        target = self._batch.output / job.name
        source = resolve_source(job.model)
        recipe = load_recipe_for(source.folder, job.recipe, job.overrides)
        request = Request(source, recipe, self._batch.calibration, None, job.lowering)
        made = to_plain(request.fingerprint("quantize" if job.lowering is None else "convert"))
        record = self._records.get(job.name)
        if target.exists() and record is not None:
            changed = find_difference(record["fingerprint"], made)
            if changed is None:
                return self._measure(job, TAKEN_OVER, record["seconds"])
            if not self._force:
                raise UsageError(f"'{target}' had {changed}", remedy="pass --force to make it again")
        check_target(target, force=self._force, source=source.folder)
        self._record(job.name, None if target.exists() else {"fingerprint": made, "seconds": None})
        begun = time.monotonic()
        with self._begin(job.name) as run:
            request = replace(request, tokens=self._collect_tokens(target, request, run))
            make = quantize if job.lowering is None else self._convert
            make(request, target, replace(run, force=self._force))
        seconds = time.monotonic() - begun
        self._record(job.name, {"fingerprint": made, "seconds": seconds})
        return self._measure(job, DONE, seconds)

    def _collect_tokens(self, target: Path, request: Request, run: Run) -> Tensor | None:
        """Return the model's calibration tokens where a recipe needs them and an interrupted run kept
        none."""
        kept = WorkFolder(target.absolute()).folder / TOKENS_FILE
        if not request.calibrates or (run.resume and kept.is_file()):
            return None
        key = request.source.folder.resolve(), request.calibration
        if key not in self._tokens:
            progress = run.progress.part("calibrate", 0.0, 0.0)
            tokens = collect_tokens(request.calibration, request.checkpoint, progress, run.max_memory)
            self._tokens[key] = tokens
        return self._tokens[key]

    def _record(self, name: str, record: Mapping[str, Any] | None) -> None:
        self._records.pop(name, None)
        if record is not None:
            self._records[name] = record
        unfinished = self._file.with_name(f".{STATE}")
        write_json(unfinished, {"jobs": self._records})
        os.replace(unfinished, self._file)

    def _measure(self, job: BatchJob, state: str, seconds: float | None) -> Row:
        target = self._batch.output / job.name
        packages = job.lowering is not None
        bits = measure_stored_bits(open_checkpoint(target / CHECKPOINT_FOLDER if packages else target))
        quality = read_manifest(target)["measured"].get("quality") if packages else None
        return Row(job.name, job.model, job.recipe, state, bits, quality, seconds)


def _read_records(path: Path) -> dict[str, Any]:
    """Read what `_record` wrote."""
    values = read_json(path)
    jobs = values.get("jobs") if isinstance(values, dict) else None
    if not isinstance(jobs, dict) or not all(
        isinstance(record, dict) and record.keys() == {"fingerprint", "seconds"} for record in jobs.values()
    ):
        raise InputError(
            f"'{path}' is no record of a batch", remedy="remove it; --force then makes all jobs again"
        )
    return jobs
