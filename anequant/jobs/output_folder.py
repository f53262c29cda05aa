"""Output folders: whether they can be made, and the hashes of what is in them."""

from __future__ import annotations

import hashlib
import shutil
import stat
from pathlib import Path

from anequant.errors import ResourceError, UsageError, quote


def check_output(target: Path, *, force: bool, source: Path) -> None:
    """Raises UsageError when `target` exists (unless it is a folder and `force`), lies under a file,
    cannot be a name, or overlaps the folder `source` that is to be read."""
    if str(target) != str(target).encode(errors="replace").decode():
        what = f"output {quote(str(target))} cannot be created: its name is no UTF-8"
        raise UsageError(what, remedy="Core ML's libraries take no other; name another folder")
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


def require_space(target: Path, needed: int) -> None:
    """Raises ResourceError when the disk that holds the folder of `target` has less than `needed` bytes."""
    available = shutil.disk_usage(target.parent).free
    if available < needed:
        raise ResourceError(
            f"'{target}' needs {needed:,} bytes, and {available:,} are free",
            remedy="free disk space, or name a folder on another disk",
        )


def hash_files(folder: Path, names: list[str] | None = None) -> dict[str, str]:
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
