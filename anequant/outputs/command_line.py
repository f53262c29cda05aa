"""The command that makes an output again, from what was asked for: no folder of this machine is in it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from anequant.checkpoints.rotation_files import ROTATIONS
from anequant.checkpoints.source import Source
from anequant.lower_options import BOTH, COREAI, AssetOptions, LowerOptions, Targets
from anequant.recipe import Calibration, Recipe
from anequant.recipe_files import DEFAULT_RECIPE, ROTATION_KEYS, load_recipe, named_recipes

OUTPUT = "OUT"
"""What the output folder is called here."""


def quantize_command(source: Source, recipe: Recipe, calibration: Calibration, *, rotated: bool) -> str:
    """Return `anequant quantize ...`; `rotated`: the source is a rotated checkpoint, which brings its
    matrices."""
    return _command("quantize", source, [*_recipe_words(recipe, rotated), *_calibration_words(calibration)])


def rotate_command(source: Source, recipe: Recipe, calibration: Calibration) -> str:
    """Return `anequant rotate ...`, which takes the recipe's keys of rotations only."""
    words = _recipe_words(recipe, False, ROTATION_KEYS)
    return _command("rotate", source, [*words, *_calibration_words(calibration)])


def convert_command(
    source: Source, recipe: Recipe, calibration: Calibration, targets: Targets, *, rotated: bool
) -> str:
    """Return `anequant convert ...`; `rotated` as in `quantize_command`."""
    words = [*_recipe_words(recipe, rotated), *_calibration_words(calibration), *_lowering_words(targets)]
    return _command("convert", source, words)


def model_word(source: Source) -> str:
    """Return MODEL: the hub's name of it at that commit, or a folder's own name."""
    if source.repo is None:
        return source.name
    return source.repo if source.revision is None else f"{source.repo}@{source.revision}"


def _command(verb: str, source: Source, words: list[str]) -> str:
    return shlex.join(["anequant", verb, model_word(source), "-o", OUTPUT, *words])


def _recipe_words(recipe: Recipe, rotated: bool, known: Collection[str] | None = None) -> list[str]:
    """Return the named recipe that takes the fewest options beside it, and these as far as they are
    `known`."""
    wanted = recipe.to_dict()
    choices = {
        name: {key: wanted[key] for key, value in load_recipe(name).to_dict().items() if value != wanted[key]}
        for name in named_recipes()
    }
    name = min(choices, key=lambda name: (len(choices[name]), name != DEFAULT_RECIPE))
    words = [] if name == DEFAULT_RECIPE else ["--recipe", name]
    if "file" in (recipe.r1, recipe.r2) and not rotated:
        words += ["--rotations", ROTATIONS]
    changed = {key: value for key, value in choices[name].items() if known is None or key in known}
    return words + _options(changed)


def _calibration_words(calibration: Calibration) -> list[str]:
    default = Calibration()
    changed = _changed(calibration, default)
    weights = changed.pop("weights", ())
    words = []
    for number, source in enumerate(changed.pop("sources", default.sources if weights else ())):
        weight = f"={weights[number]}".removesuffix(".0") if weights else ""
        words += ["--calib", Path(source).name + weight]
    return words + _options({f"calib_{key}": value for key, value in changed.items()})


def _lowering_words(targets: Targets) -> list[str]:
    """Return --target, where it is not Core ML alone, and what is not the default of each."""
    changed: dict[str, Any] = {}
    if targets.asset is not None:
        changed["target"] = COREAI if targets.lowering is None else BOTH
        changed |= _changed(targets.asset, AssetOptions())
    if targets.lowering is not None:
        changed |= _changed(targets.lowering, LowerOptions())
    return _options(changed)


def _changed(value: Any, default: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not the default's."""
    own, plain = dataclasses.asdict(value), dataclasses.asdict(default)
    return {key: item for key, item in own.items() if item != plain[key]}


def _options(values: Mapping[str, Any]) -> list[str]:
    """Return each key as the option that is called like it."""
    words: list[str] = []
    for key, value in values.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words
