"""Recipe files: the named ones in `configs/`, and the strict loader of TOML, JSON and YAML."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from anequant.errors import UsageError, did_you_mean
from anequant.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_RECIPE = "w4-ane"
RECIPE_SUFFIXES = (".toml", ".json", ".yaml", ".yml")
ROTATION_KEYS = ("r1", "r1_block", "r2", "r3", "r4", "r4_block", "seed", "restarts", "learn")
"""The recipe's keys that say how a float model is rotated, before anything is rounded."""


def load_recipe(name_or_path: str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by name (`configs/`) or from a TOML, JSON or YAML file, then apply `overrides`.

    Raises UsageError for an unknown recipe, an unreadable file, an unknown key (with a suggestion),
    a wrong type or a value outside the choices.
    """
    values = _read_recipe_file(_find_recipe(name_or_path or DEFAULT_RECIPE))
    return recipe_from_dict({**values, **(overrides or {})})


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Build a Recipe from keys and values; raises UsageError as `load_recipe` does."""
    known = [item.name for item in dataclasses.fields(Recipe)]
    for key in values:
        if key not in known:
            raise UsageError(f"unknown recipe key '{key}'", remedy=did_you_mean(str(key), known))
    return Recipe(**values)


def named_recipes() -> dict[str, Path]:
    """The recipes that come with the project, by name."""
    return {path.stem: path for path in sorted(_configs_folder().glob("*.toml"))}


def _configs_folder() -> Path:
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def _find_recipe(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in RECIPE_SUFFIXES or path.is_file():
        if not path.is_file():
            raise UsageError(f"recipe file '{name_or_path}' does not exist")
        return path
    recipes = named_recipes()
    if name_or_path not in recipes:
        raise UsageError(f"unknown recipe '{name_or_path}'", remedy=did_you_mean(name_or_path, recipes))
    return recipes[name_or_path]


def _read_recipe_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values: Any
        if path.suffix == ".json":
            values = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            values = yaml.safe_load(text)
        else:
            values = tomllib.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"recipe file '{path}' cannot be read: {reason}") from error
    if not isinstance(values, dict):
        raise UsageError(f"recipe file '{path}' holds no table of keys and values")
    return values
