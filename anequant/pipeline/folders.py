"""Where the parts of an output are."""

from __future__ import annotations

from pathlib import Path

from anequant.errors import InputError

CHECKPOINT_FOLDER, PACKAGES_FOLDER = "checkpoint", "packages"


def packages_folder(folder: Path) -> Path:
    """Where the packages of an output are: below it for convert's, itself for lower's.

    Raises InputError when the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"folder '{folder}' does not exist")
    return folder / PACKAGES_FOLDER if (folder / PACKAGES_FOLDER).is_dir() else folder
