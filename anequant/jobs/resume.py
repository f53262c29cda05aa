"""A job that is written to a work folder, unit by unit, and is gone on with after an interrupt or a crash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anequant.errors import Interrupted
from anequant.jobs.control import Control, Expected
from anequant.jobs.journal import Journal, is_journal_of
from anequant.jobs.output_folder import require_space
from anequant.jobs.tasks import TasksLost
from anequant.jobs.work_folder import DamagedWork, WorkFolder, is_full, work_folder
from anequant.quantization.kernels import cache_folder

UNCACHED = "the loops of rounding are compiled in this run alone, no folder to keep them in can be written to"


@contextmanager
def resumable(
    output: Path,
    fingerprint: Mapping[str, Any],
    *,
    needed: int,
    force: bool,
    source: Path,
    control: Control,
    units: Sequence[Expected],
) -> Iterator[Journal]:
    """The journal of a job; when the block ends well its output folder takes the name `output`.

    An interrupt, a full disk or a lost cluster leaves the work folder, so that the next run with the same
    `fingerprint` goes on there, and DamagedWork leaves it as it is; any other error removes it. `needed` are
    the bytes that the whole job writes, `units` what it is going to do.

    Raises as `work_folder` and `Journal` do, ResourceError when the disk has less room than the rest of the
    job needs, and Interrupted in the place of KeyboardInterrupt when there is something to go on with.
    """

    def ended(work: WorkFolder) -> bool:
        return control.resume and is_journal_of(work, fingerprint)

    with work_folder(output, force=force, source=source, ended=ended) as work:
        fresh = not (control.resume and work.journal.is_file())
        try:
            journal = Journal(work, fingerprint, control)
            there = _used(work.folder) + (_used(work.target) if work.half_published else 0)
            require_space(work.target, needed - there)
        except BaseException:
            if fresh:
                work.clear()
            raise
        if journal.units:
            control.note(f"resuming '{output}': {_done(journal)}")
        if fingerprint["recipe"] and cache_folder() is None:
            control.note(UNCACHED)
        journal.plan(units)
        try:
            yield journal
            work.publish()
        except KeyboardInterrupt as stop:
            if not journal.units:
                work.clear()
                raise
            raise Interrupted(f"kept in '{work.folder}': {_done(journal)}") from stop
        except DamagedWork:
            raise
        except BaseException as error:
            kept = is_full(error) or isinstance(error, TasksLost)
            if not kept or not journal.units:
                work.clear()
            raise


def _done(journal: Journal) -> str:
    units = journal.units
    return f"{len(units)} unit{'s are' if len(units) > 1 else ' is'} done, the last is '{units[-1]}'"


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
