"""Where an output is made before it takes its name: a folder beside it that one process holds at a time.

    .NAME.partial/        beside the target NAME
      lock                held while a process works here
      journal.jsonl       what is done; without it nothing here is worth keeping
      output/             becomes NAME by a rename, when all of it is on disk
      replaced/           what NAME was, while --force exchanges it

A crash at any point leaves NAME as it was, or as it is to be, or in replaced/, from where the next run puts
it back. NAME as it is to be with a journal beside it is a job that ended while it was about to say so.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from anequant.errors import OS_REMEDIES, InputError, ResourceError, UsageError
from anequant.jobs.output_folder import check_output

LOCK, JOURNAL, OUTPUT, REPLACED = "lock", "journal.jsonl", "output", "replaced"
START_OVER = "start over with --no-resume"
FULL = (errno.ENOSPC, errno.EDQUOT)


class DamagedWork(InputError):
    """What an interrupted run left cannot be resumed; it is left as it is."""

    def __init__(self, what: str, folder: Path) -> None:
        super().__init__(what, where=str(folder), remedy=START_OVER)


@contextmanager
def reading_work(path: Path) -> Iterator[None]:
    """In here a file that an earlier run left is read; raises DamagedWork for what goes wrong with that."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise DamagedWork(f"'{path.name}' of an interrupted run is damaged", path.parent) from error


@dataclass(frozen=True)
class WorkFolder:
    """The folder that belongs to an absolute `target`."""

    target: Path

    @property
    def folder(self) -> Path:
        return self.target.with_name(f".{self.target.name}.partial")

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL

    @property
    def output(self) -> Path:
        return self.folder / OUTPUT

    @property
    def replaced(self) -> Path:
        return self.folder / REPLACED

    @property
    def half_published(self) -> bool:
        """Whether a crash broke `publish` off."""
        return self.target.name != "" and os.path.lexists(self.journal) and not self.output.exists()

    @property
    def written(self) -> Path:
        """Where the output is, under its own name or not yet."""
        return self.target if self.half_published else self.output

    def publish(self) -> None:
        """Give the output its name; an existing target is kept until the new one is in its place."""
        if self.half_published:
            self.journal.unlink()
            return
        sync_tree(self.output)
        if self.target.exists():
            shutil.rmtree(self.replaced, ignore_errors=True)
            self.target.rename(self.replaced)
        try:
            self.output.rename(self.target)
            sync(self.target.parent)
            self.journal.unlink(missing_ok=True)
        finally:
            self.put_back()

    def put_back(self) -> None:
        """Undo an exchange that was broken off."""
        if self.replaced.exists() and not self.target.exists():
            self.replaced.rename(self.target)
            sync(self.target.parent)

    def clear(self) -> None:
        """Throw away what is here; the journal first, so that a crash leaves nothing to go on with."""
        self.put_back()
        self.journal.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()


def check_target(target: Path, *, force: bool, source: Path) -> WorkFolder:
    """Return the work folder of `target`, which is not made yet; raises as `check_output`, but for an
    exchange that a crash broke off."""
    work = WorkFolder(Path(os.path.abspath(os.path.expanduser(target))))
    check_output(work.target, force=force or work.half_published, source=source)
    return work


@contextmanager
def work_folder(
    target: Path, *, force: bool, source: Path, ended: Callable[[WorkFolder], bool] = lambda work: False
) -> Iterator[WorkFolder]:
    """The work folder of `target`, locked; it disappears in the end unless there is a journal in it.

    Where a crash left the output under its name and the journal, `ended` tells whether that is this job; else
    the output is another one. Raises as `check_output` does, UsageError when the folder cannot be made or
    another process works in it, and ResourceError when the disk is full.
    """
    work = check_target(target, force=force, source=source)
    target = work.target
    created = [parent for parent in target.parents if not parent.exists()]
    lock = _lock(work, created)
    try:
        work.put_back()
        taken_up = work.half_published and target.is_dir() and ended(work)
        if not taken_up and not (work.journal.is_file() and work.output.is_dir()):
            work.clear()
        check_output(target, force=force or taken_up, source=source)
        yield work
    except Exception as error:
        refused = _name_refusal(error, work)
        if refused is not None and not is_full(error):
            raise refused from error
        if not is_full(error):
            raise
        kept = "; the same command then goes on where it stopped" if work.journal.is_file() else ""
        raise ResourceError(f"no space left for '{target}'", remedy=f"free disk space{kept}") from error
    finally:
        _remove(work, created)
        lock.release()


@contextmanager
def staged_folder(target: Path, *, force: bool, source: Path) -> Iterator[Path]:
    """A new folder that takes the name `target` when the block ends well, else disappears.

    With `force` an existing folder is exchanged. Raises as `work_folder` does.
    """
    with work_folder(target, force=force, source=source) as work:
        work.clear()
        work.output.mkdir()
        yield work.output
        work.publish()


def _name_refusal(error: Exception, work: WorkFolder) -> ResourceError | None:
    """Return what the system refused of the output, with its name and what to do; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in OS_REMEDIES:
        return None
    place = Path(error.filename or work.folder)
    if not place.is_relative_to(work.folder):
        return None
    what = f"output '{work.target}' cannot be written: {error.strerror}"
    return ResourceError(what, where=str(place), remedy=OS_REMEDIES[error.errno])


def _lock(work: WorkFolder, created: list[Path]) -> FileLock:
    """Take the lock of a work folder at once or not at all, and return it."""
    try:
        if work.folder.is_symlink():
            raise UsageError(f"'{work.folder}' is a link, and work is done there", remedy="remove it")
        work.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work.folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"output '{work.target}' is being written by another process",
            remedy="wait for it to end, or name another folder",
        ) from error
    except OSError as error:
        _remove(work, created)
        kind = ResourceError if is_full(error) else UsageError
        raise kind(f"output '{work.target}' cannot be created: {error.strerror}") from error
    return lock


def _remove(work: WorkFolder, created: list[Path]) -> None:
    """Remove the work folder unless there is a journal in it, and made folders as far as they are empty."""
    if not work.journal.is_file():
        work.put_back()
        shutil.rmtree(work.folder, ignore_errors=True)
    for folder in created:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def is_full(error: BaseException) -> bool:
    """Return whether an error says that the disk is full, also in the words of a library around the
    system's."""
    said = any(os.strerror(number) in str(error) for number in FULL)
    return said or (isinstance(error, OSError) and error.errno in FULL)


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names where the file system can be told to."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)
