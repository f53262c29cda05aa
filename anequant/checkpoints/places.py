"""Where the parts of an output are."""

from __future__ import annotations

from pathlib import Path

from anequant.errors import InputError

CHECKPOINT_FOLDER, PACKAGES_FOLDER, BUNDLE_FOLDER = "checkpoint", "packages", "coreai"
BUNDLE_KIND = "bundle"
"""What the manifest of a folder with an asset of Core AI says that it is."""

BUNDLE_METADATA = "metadata.json"

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


def has_packages(folder: Path) -> bool:
    """Whether there are Core ML packages at a path: in an output of convert, or in lower's."""
    return (folder / PACKAGES_FOLDER).is_dir() or any(folder.glob("*.mlpackage"))


def find_bundle(folder: Path) -> Path | None:
    """Return the folder of an output's bundle of Core AI: one below it for convert's, itself for lower's.

    None where there is none.
    """
    for place in (folder / BUNDLE_FOLDER, folder):
        if (place / BUNDLE_METADATA).is_file() and any(place.glob("*.aimodel")):
            return place
    return None
