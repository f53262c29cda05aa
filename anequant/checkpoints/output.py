"""Output folders that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anequant.errors import ResourceError, UsageError


def check_output(target: Path, *, force: bool, source: Path) -> None:
    """Raises UsageError when `target` exists (unless it is a folder and `force`), lies under a file,
    cannot be a name, or overlaps the folder `source` that is to be read."""
    try:
        link = stat.S_ISLNK(target.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        link = False
    except OSError as error:
        raise UsageError(f"output '{target}' cannot be created: {error.strerror}") from error
    if (target.exists() or link) and not force:
        raise UsageError(f"output '{target}' exists", remedy="name another folder, or pass --force")
    if link or (target.exists() and not target.is_dir()):
        raise UsageError(f"output '{target}' is a {'link' if link else 'file'}, not a folder")
    for parent in target.parents:
        if parent.exists() and not parent.is_dir():
            raise UsageError(f"output '{target}' lies under '{parent}', which is no folder")
    real, read = target.resolve(), source.resolve()
    if real.is_relative_to(read) or read.is_relative_to(real):
        raise UsageError(f"output '{target}' overlaps '{source}'", remedy="write beside what is read")


@contextmanager
def staged_folder(target: Path, *, force: bool, source: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends well, else disappears.

    With `force` an existing folder is replaced in the same step. Raises as `check_output` does,
    UsageError when the folder cannot be created, and ResourceError when the disk is full.
    """
    target = Path(os.path.abspath(target.expanduser()))
    check_output(target, force=force, source=source)
    created = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        _remove_empty(created)
        raise UsageError(f"output '{target}' cannot be created: {error.strerror}") from error
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        for path in staging.rglob("*"):
            if path.is_file():
                _sync(path)
        _replace(staging, target)
        created = []
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no space left for '{target}'", remedy="free disk space") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(created)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def file_hashes(folder: Path, names: list[str] | None = None) -> dict[str, str]:
    """sha256 of every file below `folder` (or of `names` in it), by relative path."""
    files = (
        [folder / name for name in names]
        if names is not None
        else sorted(path for path in folder.rglob("*") if path.is_file())
    )
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _replace(staging: Path, target: Path) -> None:
    if target.exists():
        old = target.with_name(f"{staging.name}.old")
        target.rename(old)
        staging.rename(target)
        shutil.rmtree(old)
    else:
        staging.rename(target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
