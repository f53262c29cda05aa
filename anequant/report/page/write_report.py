"""`anequant report`: report.html and report.json of an output, beside what it promises."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from anequant.checkpoints.manifest import read_manifest
from anequant.checkpoints.places import CHECKPOINT_FOLDER, REPORT_DATA, REPORT_PAGE
from anequant.checkpoints.reader import read_json, read_object
from anequant.checkpoints.source import BUNDLED_MODEL, Source, resolve_source
from anequant.checkpoints.writer import format_json
from anequant.errors import InputError
from anequant.jobs.control import Progress, silent
from anequant.jobs.output_folder import hash_files
from anequant.report.page.render import render_report
from anequant.report.page.report_data import SCHEMA, collect_report
from anequant.report.page.report_layers import Known, Origin


@dataclass(frozen=True)
class Report:
    """Where a report is, and its `data`."""

    folder: Path
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return where the files are and what is missing; the data is in the second of them."""
        return {
            "report": str(self.folder / REPORT_PAGE),
            "data": str(self.folder / REPORT_DATA),
            "worst": self.data["worst"],
            "missing": self.data["missing"],
        }


def write_report(
    folder: Path,
    source: Source | None = None,
    *,
    base: str | None = None,
    text: Path | None = None,
    run: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> Report:
    """Write the report of an output of convert or quantize into it.

    `source` is the float model where it is known; else it is looked for: `base` (a folder or hub id), the
    bundled model, or the hub's. `run` is what a Stopwatch saw. A report that is there already is replaced,
    and lends what cannot be measured any more. Raises what `collect_report` raises, and InputError for a
    `base` of which the checkpoint was not made.
    """
    read_manifest(folder)
    origin = _find_origin(folder, base) if source is None else Origin(source)
    data = collect_report(folder, Known(origin, text, run, _read_former(folder)), progress)
    page = render_report(data)
    replace_file(folder / REPORT_DATA, format_json(data))
    replace_file(folder / REPORT_PAGE, page)
    return Report(folder, data)


def read_report(folder: Path) -> Report:
    """Read the report that is in the output `folder`. Raises InputError where there is none."""
    return Report(folder, read_object(folder / REPORT_DATA))


def replace_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _find_origin(folder: Path, base: str | None) -> Origin:
    inner = folder / CHECKPOINT_FOLDER
    record = read_manifest(inner if inner.is_dir() else folder).get("source")
    if not isinstance(record, dict):
        return Origin(None, "the manifest does not tell the model's name")
    name, repo, revision = record["name"], record.get("repo"), record["revision"]
    if base is not None:
        source = resolve_source(base)
        if not _same(source.folder, record["files"]):
            raise InputError(
                f"'{base}' is not the model that this checkpoint was made from ({name})",
                remedy="name that one with --base",
            )
        return Origin(source)
    if name == BUNDLED_MODEL.name and _same(BUNDLED_MODEL, record["files"]):
        return Origin(Source(BUNDLED_MODEL, name))
    if repo is None:
        reason = f"the float model {name} was a folder, and which is not recorded; name it with --base"
        return Origin(None, reason)
    try:
        source = resolve_source(f"{repo}@{revision}" if revision else repo)
    except InputError as error:
        return Origin(None, error.what)
    same = _same(source.folder, record["files"])
    return Origin(source) if same else Origin(None, f"the hub's {repo} is another model now")


def _same(folder: Path, files: dict[str, str]) -> bool:
    there = all((folder / name).is_file() for name in files)
    return there and hash_files(folder, list(files)) == files


def _read_former(folder: Path) -> dict[str, Any] | None:
    """Return the report that is there, None where there is none of this schema.

    Raises InputError for one that no page can be made of.
    """
    path = folder / REPORT_DATA
    if not path.is_file():
        return None
    value = read_json(path)
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        return None
    try:
        render_report(value)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UndefinedError) as error:
        what = "the report that is there is damaged"
        raise InputError(what, where=str(path), remedy="remove it") from error
    return value
