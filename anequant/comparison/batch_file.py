"""The file of `anequant batch`: many models and recipes, what they are calibrated on and lowered to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.calibration.shares import make_calibration
from anequant.errors import UsageError, did_you_mean, quote
from anequant.lower_options import LowerOptions
from anequant.recipe import Calibration
from anequant.recipe_files import DEFAULT_RECIPE, load_recipe
from anequant.strict import parse_toml, read_plain

LARGEST_FILE = 1_000_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Kind = type | tuple[type, ...]
"""What a value may be."""

TOP = {"output": str, "calibration": dict, "lowering": dict, "job": list}
JOB = {"model": str, "recipe": str, "name": str, "overrides": dict, "lowering": dict, "packages": bool}
CALIBRATION: dict[str, Kind] = {
    "source": (str, list),
    "samples": int,
    "length": int,
    "seed": int,
    "chat": bool,
}
LEAST = {"samples": 1, "length": 2, "seed": 0}
LOWERING = {"context": int, "batch": int, "chunks": int, "max_chunk_mb": int, "argmax": bool, "prefix": str}
WORDS = {str: "a string", int: "a whole number", bool: "true or false", dict: "a table", list: "an array"}


@dataclass(frozen=True)
class BatchJob:
    """One line of a batch: `model` and `recipe` as on the command line, `overrides` of the recipe's keys;
    without `lowering` no packages are made."""

    name: str
    model: str
    recipe: str
    overrides: Mapping[str, Any]
    lowering: LowerOptions | None


@dataclass(frozen=True)
class Batch:
    """Every job writes to the folder of its name in `output`."""

    output: Path
    calibration: Calibration
    jobs: tuple[BatchJob, ...]


def read_batch(path: Path) -> Batch:
    """Read a batch from TOML. Paths in it are relative to the current folder, as on the command line.

    Raises UsageError for a file that cannot be read, an unknown key, a wrong type, a recipe that is none, and
    names that are none or appear twice.
    """
    try:
        values = parse_toml(read_plain(path, LARGEST_FILE))
    except (OSError, ValueError) as error:
        raise UsageError(f"batch file '{path}' cannot be read: {error}") from error
    try:
        return _batch(values)
    except UsageError as error:
        where = ", ".join(part for part in (f"batch file '{path}'", error.where) if part)
        raise UsageError(error.what, where=where, remedy=error.remedy) from error


def _batch(values: dict[str, Any]) -> Batch:
    _check(values, TOP, "", required=("output", "job"))
    calibration, lowering = values.get("calibration", {}), values.get("lowering", {})
    _check(calibration, CALIBRATION, "[calibration]")
    for key, least in LEAST.items():
        if calibration.get(key, least) < least:
            raise UsageError(f"'{key}' is {calibration[key]}, the least is {least}", where="[calibration]")
    _check(lowering, LOWERING, "[lowering]")
    seen = _read_calibration(calibration)
    jobs: list[BatchJob] = []
    for number, table in enumerate(values["job"], 1):
        job = _job(table, lowering, f"job {number}")
        if job.name in [other.name for other in jobs]:
            raise UsageError(f"two jobs are called '{job.name}'", remedy="give one another name")
        jobs.append(job)
    if not jobs:
        raise UsageError("there is no job", remedy="add a table [[job]] with a model")
    return Batch(Path(os.path.expanduser(values["output"])), seen, tuple(jobs))


def _read_calibration(table: Mapping[str, Any]) -> Calibration:
    """Return the calibration of a table whose keys are of the right types, `source` a string or several."""
    default = Calibration()
    words = table.get("source", list(default.sources))
    if isinstance(words, list) and not all(isinstance(word, str) for word in words):
        raise UsageError(f"'source' is {quote(words)}, and has to hold strings", where="[calibration]")
    sizes = (table.get(key, getattr(default, key)) for key in ("samples", "length", "seed"))
    try:
        return make_calibration(words, *sizes, chat=table.get("chat", default.chat))
    except UsageError as error:
        raise UsageError(error.what, where="[calibration]", remedy=error.remedy) from error


def _job(table: Any, lowering: Mapping[str, Any], place: str) -> BatchJob:
    if not isinstance(table, dict):
        raise UsageError("a job is no table", where=place, remedy="begin each job with [[job]]")
    _check(table, JOB, place, required=("model",))
    _check(table.get("lowering", {}), LOWERING, f"lowering of {place}")
    recipe, overrides = table.get("recipe", DEFAULT_RECIPE), table.get("overrides", {})
    try:
        load_recipe(recipe, overrides)
    except UsageError as error:
        where = ", ".join(part for part in (place, error.where) if part)
        raise UsageError(error.what, where=where, remedy=error.remedy) from error
    name = table.get("name", f"{_name_last_part(table['model'])}-{Path(recipe).stem}")
    if not NAME.fullmatch(name):
        raise UsageError(
            f"the name {quote(name)} cannot be a folder's",
            where=place,
            remedy="use letters, digits, . _ and -",
        )
    options = LowerOptions(**{**lowering, **table.get("lowering", {})})
    return BatchJob(name, table["model"], recipe, overrides, options if table.get("packages", True) else None)


def _name_last_part(model: str) -> str:
    """The last part of a folder or a hub id, without its revision."""
    return Path(os.path.expanduser(model)).resolve().name.partition("@")[0]


def _check(
    table: Mapping[str, Any], kinds: Mapping[str, Kind], where: str, required: tuple[str, ...] = ()
) -> None:
    """Raises UsageError for a key that is unknown, missing or of another type."""
    for key, value in table.items():
        if key not in kinds:
            raise UsageError(f"unknown key {quote(key)}", where=where, remedy=did_you_mean(key, kinds))
        kind = kinds[key]
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in allowed:
            wanted = " or ".join(WORDS[kind] for kind in allowed)
            raise UsageError(f"'{key}' is {quote(value)}, and has to be {wanted}", where=where)
    for key in required:
        if key not in table:
            raise UsageError(f"there is no '{key}'", where=where, remedy="docs/batch.md shows a file")
