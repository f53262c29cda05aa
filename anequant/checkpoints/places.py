"""Where the parts of an output are."""

from __future__ import annotations

from pathlib import Path

from anequant.errors import InputError

CHECKPOINT_FOLDER, PACKAGES_FOLDER = "checkpoint", "packages"
REPORT_PAGE, REPORT_DATA = "report.html", "report.json"
REPORTS = {f"{place}{name}" for place in ("", f"{CHECKPOINT_FOLDER}/") for name in (REPORT_PAGE, REPORT_DATA)}
"""Beside what an output promises: they hold times, so they are no part of its hashes."""


def find_packages(folder: Path) -> Path:
    """Return the folder of an output's packages: one below it for convert's, itself for lower's.

    Raises InputError when the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"folder '{folder}' does not exist")
    return folder / PACKAGES_FOLDER if (folder / PACKAGES_FOLDER).is_dir() else folder
