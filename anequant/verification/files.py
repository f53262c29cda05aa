"""An output as files: anequant.json makes sense, and every file is the one that it lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anequant.checkpoints.manifest import CHECKPOINT, MANIFEST, ROTATED, read_manifest
from anequant.checkpoints.places import BUNDLE_KIND, REPORTS
from anequant.errors import InputError, UnsupportedError, UsageError, VerificationError, quote
from anequant.jobs.output_folder import hash_files
from anequant.recipe import Recipe
from anequant.recipe_files import ROTATION_KEYS, recipe_from_dict

PACKAGES, CONVERSION = "packages", "conversion"
PARTS = {
    CHECKPOINT: ("recipe", "source", "measured"),
    ROTATED: ("recipe", "source", "measured"),
    PACKAGES: ("checkpoint", "options", "packages"),
    BUNDLE_KIND: ("checkpoint", "options"),
    CONVERSION: ("recipe", "measured"),
}
"""What a folder of each kind says of itself, besides its files and versions."""

FLOAT = {"bits": 16, "rounding": "nearest"}
"""What `rotate` does not do."""

OF_THE_HUB = (".gitattributes", ".cache/huggingface/")
"""What a download of an output has beside it: the repository's own file, and huggingface_hub's notes."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@contextmanager
def failing(where: Path) -> Iterator[None]:
    """Make what is wrong with the files of an output a failed verification, whichever reader finds it."""
    try:
        yield
    except (InputError, UnsupportedError) as error:
        raise VerificationError(error.what, where=error.where or str(where), remedy=error.remedy) from error


def verify_files(folder: Path, *kinds: str) -> dict[str, Any]:
    """Compare every file with the hash in the folder's anequant.json, which is of one of these kinds
    if there are any; returns that manifest.

    Raises InputError where there is no anequant.json, VerificationError when it makes no sense, or naming
    the first file that is missing, changed, extra or no regular file.
    """
    recorded = read_checked_manifest(folder)
    if kinds and recorded["kind"] not in kinds:
        raise VerificationError(f"'{MANIFEST}' is of the kind {quote(recorded['kind'])}", where=str(folder))
    expected: dict[str, str] = recorded["files"]
    present = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(OF_THE_HUB):
            continue
        if path.is_file():
            present.add(name)
        elif path.is_symlink() or not path.is_dir():
            raise VerificationError(f"{quote(name)} is neither file nor folder", where=str(folder))
    for name in sorted(set(expected) - present):
        raise VerificationError(f"file {quote(name)} is missing", where=str(folder))
    for name in sorted(present - set(expected) - {MANIFEST} - REPORTS):
        raise VerificationError(f"file {quote(name)} is not one that anequant wrote", where=str(folder))
    for name, digest in hash_files(folder, sorted(expected)).items():
        if digest != expected[name]:
            raise VerificationError(f"file {quote(name)} has changed since it was written", where=str(folder))
    return recorded


def read_checked_manifest(folder: Path) -> dict[str, Any]:
    """Read the folder's anequant.json, checked by itself; raises as `verify_files`."""
    if not (folder / MANIFEST).exists():
        return read_manifest(folder)
    with failing(folder):
        recorded = read_manifest(folder)
    for problem in _problems(recorded):
        raise VerificationError(f"'{MANIFEST}' {problem}", where=str(folder), remedy="write the output again")
    return recorded


def read_recorded_recipe(recorded: dict[str, Any]) -> Recipe:
    """Read the recipe in a checked manifest; a rotated checkpoint leaves out what `rotate` leaves out.

    Raises UsageError for values that make none.
    """
    values = recorded["recipe"]
    if recorded["kind"] == ROTATED:
        if values.keys() != set(ROTATION_KEYS):
            raise UsageError("does not tell the rotations")
        values = {**values, **FLOAT}
    return recipe_from_dict(values)


def _problems(recorded: dict[str, Any]) -> Iterator[str]:
    kind = recorded.get("kind")
    if not isinstance(kind, str) or kind not in PARTS:
        yield f"is of the unknown kind {quote(kind)}"
        return
    for key in ("files", "versions", *PARTS[kind]):
        wanted = list if key == "packages" else dict
        if not isinstance(recorded.get(key), wanted):
            yield f"has no '{key}'"
            return
    for name, digest in recorded["files"].items():
        parts = name.split("/")
        if "\\" in name or not all(part.isprintable() and part not in ("", ".", "..") for part in parts):
            yield f"lists the impossible file {quote(name)}"
        elif not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            yield f"has no sha256 for {quote(name)}"
    if "recipe" in PARTS[kind]:
        try:
            read_recorded_recipe(recorded)
        except UsageError as error:
            yield f"holds an impossible recipe: {error.what}"
