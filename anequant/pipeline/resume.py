"""A job that is written to a work folder, unit by unit, and is gone on with after an interrupt or a crash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from anequant.checkpoints.license import CARD, LICENSE_FILES
from anequant.checkpoints.manifest import MANIFEST, versions
from anequant.checkpoints.output import require_space
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.rotations import ROTATIONS
from anequant.checkpoints.source import TOKENIZER_FILES
from anequant.checkpoints.work_folder import DamagedWork, WorkFolder, is_full, work_folder
from anequant.errors import Interrupted
from anequant.pipeline.journal import Journal, is_journal_of
from anequant.progress import Control, Expected
from anequant.quantization.kernels import cache_folder
from anequant.recipe import Calibration, LowerOptions, Recipe
from anequant.tasks import TasksLost

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


def fingerprint(
    job: str,
    checkpoint: Checkpoint,
    name: str,
    recipe: Recipe | None = None,
    calibration: Calibration | None = None,
    rotations: Path | None = None,
    lowering: LowerOptions | None = None,
) -> dict[str, Any]:
    """All that decides the bytes that `job` makes of the model `name`.

    Weights are told by size and time of change, small files that are named by their content.
    """
    folder = checkpoint.folder
    names = [*checkpoint.files, *TOKENIZER_FILES, CARD, *LICENSE_FILES, MANIFEST, ROTATIONS]
    sources = {name: _state(folder / name) for name in names if (folder / name).is_file()}
    named = {"rotations": rotations}
    if calibration is not None:
        named["calibration file"] = Path(calibration.source)
    return {
        "job": job,
        "model": name,
        "recipe": recipe and recipe.to_dict(),
        "calibration": calibration and asdict(calibration),
        "lowering": lowering and asdict(lowering),
        "source": sources,
        **{key: _digest(path) for key, path in named.items() if path is not None},
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def _done(journal: Journal) -> str:
    units = journal.units
    return f"{len(units)} unit{'s are' if len(units) > 1 else ' is'} done, the last is '{units[-1]}'"


def _state(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} bytes of {stat.st_mtime_ns}"


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if os.path.isfile(path) else None


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
