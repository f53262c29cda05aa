"""Output folders that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anequant.errors import ResourceError, UsageError


def check_output(target: Path, *, force: bool) -> None:
    """Raises UsageError when `target` exists (unless `force`) or its parent folder cannot hold it."""
    if (target.exists() or target.is_symlink()) and not force:
        raise UsageError(f"output '{target}' exists", remedy="name another folder, or pass --force")
    if target.exists() and not target.is_dir():
        raise UsageError(f"output '{target}' is not a folder")


@contextmanager
def staged_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends well, else disappears.

    With `force` an existing folder is replaced in the same step. Raises as `check_output` does, and
    ResourceError when the disk is full.
    """
    check_output(target, force=force)
    created = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
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
        for parent in created:
            parent.rmdir()


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
