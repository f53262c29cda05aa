"""A job that is written to a work folder, step by step, and is resumed after an interrupt or a crash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.errors import Interrupted
from anequant.jobs.control import Run
from anequant.jobs.journal import Journal, is_journal_of
from anequant.jobs.output_folder import require_space
from anequant.jobs.step import AnyStep
from anequant.jobs.tasks import TasksLost
from anequant.jobs.work_folder import DamagedWork, WorkFolder, is_full, work_folder
from anequant.quantization.kernels import cache_folder

UNCACHED = "the loops of rounding are compiled in this run alone, no folder to keep them in can be written to"


@dataclass(frozen=True)
class Job:
    """What a job does, and where: `steps` make `output` of `source`, and write `needed` bytes.

    The next run resumes an interrupted one where its `fingerprint`, all that decides the bytes of the output,
    is the same.
    """

    source: Path
    output: Path
    fingerprint: Mapping[str, Any]
    steps: Sequence[AnyStep]
    needed: int


@contextmanager
def open_job(job: Job, run: Run) -> Iterator[Journal]:
    """The journal of a job; when the block ends well its output folder takes its name.

    An interrupt, a full disk or a lost cluster leaves the work folder, so that the next run of the same job
    resumes there, and DamagedWork leaves it as it is; any other error removes it.

    Raises as `work_folder` and `Journal` do, ResourceError when the disk has less room than the rest of the
    job needs, and Interrupted in the place of KeyboardInterrupt when there is something to resume.
    """

    def ended(work: WorkFolder) -> bool:
        return run.resume and is_journal_of(work, job.fingerprint)

    with work_folder(job.output, force=run.force, source=job.source, ended=ended) as work:
        fresh = not (run.resume and work.journal.is_file())
        try:
            journal = Journal(work, job.fingerprint, run)
            there = _count_bytes(work.folder) + (_count_bytes(work.target) if work.half_published else 0)
            require_space(work.target, job.needed - there)
        except BaseException:
            if fresh:
                work.clear()
            raise
        if journal.units:
            run.note(f"resuming '{job.output}': {_count_done(journal)}")
        if job.fingerprint["recipe"] and cache_folder() is None:
            run.note(UNCACHED)
        journal.plan(job.steps)
        try:
            yield journal
            journal.require_complete()
            work.publish()
        except KeyboardInterrupt as stop:
            if not journal.units:
                work.clear()
                raise
            raise Interrupted(f"kept in '{work.folder}': {_count_done(journal)}") from stop
        except DamagedWork:
            raise
        except BaseException as error:
            kept = is_full(error) or isinstance(error, TasksLost)
            if not kept or not journal.units:
                work.clear()
            raise


def _count_done(journal: Journal) -> str:
    units = journal.units
    return f"{len(units)} unit{'s are' if len(units) > 1 else ' is'} done, the last is '{units[-1]}'"


def _count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
