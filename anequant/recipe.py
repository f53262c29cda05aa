"""A Recipe: one value for each orthogonal choice, and the strict loader of recipe files; beside it, what
else a run is told: Calibration and LowerOptions.

The fields below are the single place that names the choices; the command line's options and the
validation both read them from here. Named recipes are the files in `configs/`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from anequant.errors import UsageError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_RECIPE = "w4-ane"
TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
WIDTHS = (2, 3, 4, 6, 8)
RECIPE_SUFFIXES = (".toml", ".json", ".yaml", ".yml")


def _choice(default: Any, choices: tuple[Any, ...] | None, text: str) -> Any:
    return field(default=default, metadata={"choices": choices, "help": text})


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is rotated and quantized."""

    r1: str = _choice(
        "block-hadamard",
        ("none", "hadamard", "block-hadamard", "random"),
        "Rotation of the residual stream.",
    )
    r1_block: int = _choice(64, None, "Block size of the block-hadamard R1, a power of two.")
    r2: str = _choice("hadamard", ("none", "hadamard"), "Rotation of each value head.")
    seed: int = _choice(0, None, "Seed of the rotations' random signs.")
    codebook: str = _choice("lut", ("uniform", "lut"), "Integers, or free entries (Lloyd-Max).")
    scales: str = _choice(
        "balanced",
        ("tensor", "output", "balanced"),
        "One scale, one per row, or one per row and column.",
    )
    rounding: str = _choice("gptq", ("nearest", "gptq"), "How weights become codes.")
    correction: float = _choice(0.5, None, "Share of the target correction that gptq applies, 0 to 1.")
    descent: int = _choice(2, None, "Passes of coordinate descent over the codes after gptq.")
    refinement: int = _choice(
        4, None, "Rounds of least squares for codebook and scales, each with another pass."
    )
    fold_input_scales: bool = _choice(
        False, None, "Move every input scale into the norm or the linear before it."
    )
    premultiply_scales: bool = _choice(
        False, None, "Write scales of one: each tensor's single scale goes into its codebook."
    )
    tune: int = _choice(0, None, "Steps of distillation from the float model, codes fixed.")
    bits: int = _choice(4, WIDTHS, "Bits per weight of the seven projections of a layer.")
    target_bits: float = _choice(
        0.0, None, "Average bits per projection weight: each gets one of mixed_bits. 0: all get `bits`."
    )
    mixed_bits: str = _choice("4,8", None, "Widths that target_bits chooses from.")
    head_bits: int = _choice(16, (16, 8, 6, 4), "Bits per weight of the head; 16 keeps fp16.")
    embedding_bits: int = _choice(16, (16, 8, 6, 4), "Bits per weight of the embedding; 16 keeps fp16.")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_value(item, getattr(self, item.name))
        _check_bounds("seed", self.seed, 2**63 - 1)
        _check_bounds("correction", self.correction, 1)
        _check_bounds("descent", self.descent, 100)
        _check_bounds("refinement", self.refinement, 100)
        _check_bounds("tune", self.tune, 1_000_000)
        _check_bounds("target_bits", self.target_bits, 8)
        if self.target_bits and not all(width in WIDTHS for width in self.widths):
            raise UsageError(
                f"recipe key 'mixed_bits' is {self.mixed_bits!r}",
                remedy=f"list two or more of {', '.join(map(str, WIDTHS))}, separated by commas",
            )
        if self.fold_input_scales and self.scales != "balanced":
            raise UsageError(
                f"fold_input_scales needs input scales, and scales is '{self.scales}'",
                remedy="use scales = 'balanced'",
            )
        if self.premultiply_scales and (self.scales != "tensor" or self.tune):
            raise UsageError(
                f"premultiply_scales needs one scale per tensor that stays, and scales is '{self.scales}', "
                f"tune {self.tune}",
                remedy="use scales = 'tensor' and tune = 0",
            )
        if self.r1_block < 2 or self.r1_block & (self.r1_block - 1):
            raise UsageError(
                f"recipe key 'r1_block' is {self.r1_block}", remedy="use a power of two, for example 64"
            )

    @property
    def calibrated(self) -> bool:
        """Whether it takes calibration tokens to make."""
        return self.rounding == "gptq" or self.target_bits > 0

    @property
    def linear_scales(self) -> str:
        """The scales of a single linear: once input scales are folded away, only its rows' are left."""
        return "output" if self.fold_input_scales else self.scales

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that projections may have."""
        if not self.target_bits:
            return (self.bits,)
        return tuple(int(part) if part.strip().isdigit() else 0 for part in self.mixed_bits.split(","))

    def to_dict(self) -> dict[str, str | int | float]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Calibration:
    """Which tokens a calibrated recipe sees: `samples` windows of `length` tokens.

    `source` is self (sampled from the model), wikitext2, a text file or a JSON file of token ids.
    """

    source: str = "self"
    samples: int = 48
    length: int = 512
    seed: int = 0


@dataclass(frozen=True)
class LowerOptions:
    """What is fixed in the packages that a checkpoint is lowered to.

    context        positions the state holds
    batch          positions that prefill takes at once
    chunks         decoder packages; None: as few as keep every package within `max_chunk_mb`
    max_chunk_mb   millions of bytes
    argmax         the head ends in the best token of each part instead of logits
    prefix         of the file names; None: ANEMLL's for the architecture
    """

    context: int = 512
    batch: int = 64
    chunks: int | None = None
    max_chunk_mb: int = 950
    argmax: bool = False
    prefix: str | None = None


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


def _check_bounds(key: str, value: float, most: int) -> None:
    if not 0 <= value <= most:
        raise UsageError(f"recipe key '{key}' is {value}", remedy=f"use a number from 0 to {most}")


def _check_value(item: dataclasses.Field[Any], value: Any) -> None:
    if type(value) is not type(item.default):
        wanted = TYPE_NAMES[type(item.default)]
        raise UsageError(f"recipe key '{item.name}' must be {wanted}, not {value!r}")
    choices = item.metadata["choices"]
    if choices is not None and value not in choices:
        raise UsageError(
            f"recipe key '{item.name}' cannot be {value!r}",
            remedy="choose from " + ", ".join(str(choice) for choice in choices),
        )
