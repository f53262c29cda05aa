"""Recipe files: the named ones in `configs/`, and the strict loader of TOML, JSON and YAML."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anequant.errors import UsageError, did_you_mean, quote
from anequant.recipe import Recipe
from anequant.strict import parse_json, parse_toml, parse_yaml, read_plain

DEFAULT_RECIPE = "w4-ane"
RECIPE_SUFFIXES = (".toml", ".json", ".yaml", ".yml")
LARGEST_RECIPE = 100_000
ROTATION_KEYS = ("r1", "r1_block", "r2", "r3", "r4", "r4_block", "seed", "restarts", "learn")
"""The recipe's keys that say how a float model is rotated, before anything is rounded."""


def load_recipe(
    recipe: str | Path | Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe by name (`configs/`), from a TOML, JSON or YAML file or from a mapping of its keys, then
    apply `overrides`.

    Raises UsageError for an unknown recipe, an unreadable file, an unknown key (with a suggestion),
    a wrong type or a value outside the choices.
    """
    if isinstance(recipe, Mapping):
        return recipe_from_dict({**recipe, **(overrides or {})})
    path = _find_recipe(str(recipe or DEFAULT_RECIPE))
    values = _read_recipe_file(path)
    try:
        return recipe_from_dict({**values, **(overrides or {})})
    except UsageError as error:
        raise UsageError(
            error.what, where=f"recipe '{path}'" if _to_blame(values) else "", remedy=error.remedy
        ) from error


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Build a Recipe from keys and values; raises UsageError as `load_recipe` does."""
    known = [item.name for item in dataclasses.fields(Recipe)]
    for key in values:
        if key not in known:
            raise UsageError(f"unknown recipe key {quote(str(key))}", remedy=did_you_mean(str(key), known))
    return Recipe(**values)


def named_recipes() -> dict[str, Path]:
    """Return the recipes that come with the project, by name."""
    return {path.stem: path for path in sorted(_configs_folder().glob("*.toml"))}


def _configs_folder() -> Path:
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def _find_recipe(name_or_path: str) -> Path:
    path = Path(name_or_path)
    there = os.path.isfile(path)
    if path.suffix in RECIPE_SUFFIXES or there:
        if not there:
            raise UsageError(f"recipe file '{name_or_path}' does not exist")
        return path
    recipes = named_recipes()
    if name_or_path not in recipes:
        raise UsageError(f"unknown recipe {quote(name_or_path)}", remedy=did_you_mean(name_or_path, recipes))
    return recipes[name_or_path]


def _to_blame(values: Mapping[str, Any]) -> bool:
    """Whether a recipe file's values are no recipe by themselves."""
    try:
        recipe_from_dict(values)
    except UsageError:
        return True
    return False


def _read_recipe_file(path: Path) -> dict[str, Any]:
    parse = {".json": parse_json, ".yaml": parse_yaml, ".yml": parse_yaml}.get(path.suffix, parse_toml)
    try:
        values = parse(read_plain(path, LARGEST_RECIPE))
    except (OSError, ValueError) as error:
        raise UsageError(f"recipe file '{path}' cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"recipe file '{path}' holds no table of keys and values")
    return values
