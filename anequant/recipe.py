"""A Recipe: one value for each orthogonal choice; beside it, which tokens a calibrated one sees: Calibration.

The fields below are the single place that names the choices; the command line's options and the
validation both read them from here. Recipe files are read in `recipe_files`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from anequant.errors import UsageError, quote

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
WIDTHS = (2, 3, 4, 6, 8)
GROUPS = (32, 64, 128)
LARGEST_SEED = 2**63 - 1
CHOSEN = 0
"""Bits of a table whose width target_bits chooses."""
TABLE_BITS = (16, 8, 6, 4, CHOSEN)


def _choice(default: Any, choices: tuple[Any, ...] | None, text: str, most: int | None = None) -> Any:
    """Make a key of the recipe: one of `choices`, or a number from 0 to `most`."""
    return field(default=default, metadata={"choices": choices, "help": text, "most": most})


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is rotated and quantized."""

    r1: str = _choice(
        "block-hadamard",
        ("none", "hadamard", "block-hadamard", "random", "pca", "file"),
        "Rotation of the residual stream; file: as --rotations says.",
    )
    r1_block: int = _choice(64, None, "Block size of the block-hadamard R1, a power of two.")
    r2: str = _choice("hadamard", ("none", "hadamard", "file"), "Rotation of each value head.")
    r3: str = _choice("none", ("none", "hadamard"), "Online rotation of q and k after RoPE.")
    r4: str = _choice("none", ("none", "hadamard", "block-hadamard"), "Online rotation of down_proj's input.")
    r4_block: int = _choice(64, None, "Block size of the block-hadamard R4, a power of two.")
    seed: int = _choice(0, None, "Seed of the rotations' random signs.", most=LARGEST_SEED)
    restarts: int = _choice(
        1, None, "Seeds to try for R1 and R2, from `seed` on; the one with the least KL stays.", most=1000
    )
    learn: int = _choice(0, None, "Steps of Cayley descent that R1 and R2 learn for.", most=1_000_000)
    codebook: str = _choice("lut", ("uniform", "lut"), "Integers, or free entries (Lloyd-Max).")
    scales: str = _choice(
        "balanced",
        ("tensor", "output", "balanced", "group"),
        "One scale, one per row, one per row and column, or one per row and group of columns.",
    )
    group_size: int = _choice(32, GROUPS, "Columns that share a scale with scales = group.")
    rounding: str = _choice("gptq", ("nearest", "gptq"), "How weights become codes.")
    hessian: str = _choice(
        "loss",
        ("layer", "loss"),
        "What gptq keeps close: a layer's outputs at every token alike, or as much as they mean to the loss.",
    )
    correction: float = _choice(
        0.5, None, "Share of the target correction that gptq applies, 0 to 1.", most=1
    )
    descent: int = _choice(2, None, "Passes of coordinate descent over the codes after gptq.", most=100)
    refinement: int = _choice(
        2, None, "Rounds of least squares for codebook and scales, before such passes.", most=100
    )
    fold_input_scales: bool = _choice(
        False, None, "Move every input scale into the norm or the linear before it."
    )
    premultiply_scales: bool = _choice(
        False, None, "Write scales of one: each tensor's single scale goes into its codebook."
    )
    tune: int = _choice(0, None, "Steps of distillation from the float model.", most=1_000_000)
    tune_minutes: float = _choice(
        0.0, None, "Minutes of distillation instead of steps; the bytes depend on the machine.", most=100_000
    )
    bits: int = _choice(
        4, (*WIDTHS, 16), "Bits per weight of the seven projections of a layer; 16 keeps fp16."
    )
    target_bits: float = _choice(
        0.0,
        None,
        "Average bits per weight of what gets one of mixed_bits: projections, and tables of 0 bits. 0: all "
        "projections get `bits`.",
        most=8,
    )
    mixed_bits: str = _choice("2,3,4,6,8", None, "Widths that target_bits chooses from.")
    head_bits: int = _choice(
        16, TABLE_BITS, "Bits per weight of the head; 16 keeps fp16, 0 lets target_bits choose."
    )
    embedding_bits: int = _choice(
        16, TABLE_BITS, "Bits per weight of the embedding; 16 keeps fp16, 0 lets target_bits choose."
    )
    activation_bits: int = _choice(16, (16, 8, 4), "Bits of every projection's input; 16 keeps it float.")
    activation_overrides: str = _choice(
        "", None, "Other bits for some projections, for example down_proj=16,o_proj=8."
    )
    activation_scales: str = _choice(
        "dynamic", ("static", "dynamic"), "One scale per tensor from calibration, or one per token."
    )
    activation_range: str = _choice("absmax", ("absmax", "percentile", "mse"), "What a static scale covers.")
    activation_symmetric: bool = _choice(
        True, None, "Dynamic ranges around zero, or between each token's ends."
    )
    activation_clip: float = _choice(1.0, None, "Share of a dynamic range that is kept, 0 to 1.", most=1)
    activation_prefix: int = _choice(
        0, None, "First positions that stay in float, the fixed prefix of the cache.", most=64
    )
    smooth: float = _choice(
        0.0,
        None,
        "SmoothQuant strength on down_proj: its input scale goes from weights to activations, 0 to 1.",
        most=1,
    )
    kv_bits: int = _choice(16, (16, 8, 4), "Bits of the KV cache, a scale per token and head.")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            _check_value(item, value)
            if isinstance(item.default, float):
                object.__setattr__(self, item.name, float(value))
        for problem, remedy in _contradictions(self):
            raise UsageError(problem, remedy=remedy)

    @property
    def feeds_back(self) -> bool:
        """Whether rounding sees the inputs of what it rounds."""
        return self.rounding == "gptq" and (self.bits < 16 or self.target_bits > 0)

    @property
    def weighs_tokens(self) -> bool:
        """Whether rounding asks what each token means to the end loss."""
        return self.feeds_back and self.hessian == "loss"

    @property
    def tunes(self) -> bool:
        return self.tune > 0 or self.tune_minutes > 0

    @property
    def calibrated(self) -> bool:
        """Whether it takes calibration tokens to make."""
        weights = self.feeds_back or self.target_bits > 0
        rotations = self.r1 == "pca" or self.learn > 0 or self.restarts > 1
        return weights or rotations or self.static_activations

    @property
    def static_activations(self) -> bool:
        """Whether activations have fixed scales."""
        return self.quantizes_activations and self.activation_scales == "static"

    @property
    def quantizes_activations(self) -> bool:
        return any(bits < 16 for bits in (self.activation_bits, *self.activation_exceptions.values()))

    @property
    def activation_exceptions(self) -> Mapping[str, int]:
        """`activation_overrides` as bits by projection, for example {"down_proj": 16}."""
        parts = [part.partition("=") for part in self.activation_overrides.split(",") if part.strip()]
        return {name.strip(): int(bits) if bits.strip().isdigit() else 0 for name, _, bits in parts}

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
    """Which tokens a calibrated recipe sees: `samples` windows of `length` tokens, from all sources together.

    sources   each self (sampled from the model), wikitext2, a text file or a JSON file of rows
    weights   in which proportions they share the windows; none: in equal parts
    chat      rows of messages, and of prompt and completion, are conversations, which begin windows
    """

    sources: tuple[str, ...] = ("self",)
    samples: int = 48
    length: int = 512
    seed: int = 0
    weights: tuple[float, ...] = ()
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("there is no calibration source", remedy="name one, or leave it to the default")
        for name, weight in zip(self.sources, self.weights or (1,) * len(self.sources), strict=True):
            if not 0 < weight < math.inf:
                problem = f"the weight of calibration source {quote(name)} is {weight:g}"
                raise UsageError(problem, remedy="use a number above 0, or leave the source out")
        if len(self.sources) > self.samples:
            raise UsageError(
                f"{len(self.sources)} calibration sources take a window each, and samples is {self.samples}",
                remedy=f"use --calib-samples {len(self.sources)} or more",
            )


def _check_value(item: dataclasses.Field[Any], value: Any) -> None:
    default: Any = item.default
    whole_as_number = type(default) is float and type(value) is int
    if type(value) is not type(default) and not whole_as_number:
        wanted = TYPE_NAMES[type(default)]
        raise UsageError(f"recipe key '{item.name}' must be {wanted}, not {quote(value)}")
    choices, most = item.metadata["choices"], item.metadata["most"]
    if choices is not None and value not in choices:
        raise UsageError(
            f"recipe key '{item.name}' cannot be {quote(value)}",
            remedy="choose from " + ", ".join(str(choice) for choice in choices),
        )
    if most is not None and not 0 <= value <= most:
        raise UsageError(
            f"recipe key '{item.name}' is {quote(value)}", remedy=f"use a number from 0 to {most}"
        )


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield what the values, each of them allowed, do not allow together: the problem and its remedy."""
    for key in ("r1_block", "r4_block"):
        block = getattr(recipe, key)
        if block < 2 or block & (block - 1):
            yield f"recipe key '{key}' is {block}", "use a power of two, for example 64"
    if recipe.restarts < 1:
        yield "recipe key 'restarts' is 0", "use 1 or more"
    if recipe.target_bits and not all(width in WIDTHS for width in recipe.widths):
        yield (
            f"recipe key 'mixed_bits' is {quote(recipe.mixed_bits)}",
            f"list two or more of {', '.join(map(str, WIDTHS))}, separated by commas",
        )
    for key in ("head_bits", "embedding_bits"):
        if getattr(recipe, key) == CHOSEN and not recipe.target_bits:
            yield (
                f"recipe key '{key}' is 0, and there is no target_bits to choose by",
                "set target_bits, for example 4.5, or choose from 16, 8, 6, 4",
            )
    if recipe.fold_input_scales and recipe.scales != "balanced":
        yield (
            f"fold_input_scales needs input scales, and scales is '{recipe.scales}'",
            "use scales = 'balanced'",
        )
    if recipe.premultiply_scales and (recipe.scales != "tensor" or recipe.tunes):
        yield (
            f"premultiply_scales needs one scale per tensor that stays, and scales is '{recipe.scales}', "
            f"tune {recipe.tune}",
            "use scales = 'tensor' and tune = 0",
        )
    if recipe.fold_input_scales and recipe.r4 != "none":
        yield (
            "fold_input_scales moves an input scale from down_proj to up_proj, r4 turns what lies between",
            "use r4 = 'none', or keep the input scales",
        )
    if recipe.premultiply_scales and recipe.static_activations:
        yield (
            "premultiply_scales puts a scale into the codebook, static activations multiply its integers",
            "use premultiply_scales = false, or dynamic activations",
        )
    for name, bits in recipe.activation_exceptions.items():
        if bits not in (16, 8, 4):
            yield f"activation_overrides gives {quote(name)} {bits} bits", "use 16, 8 or 4"
    if recipe.tunes and (recipe.bits == 16 or recipe.static_activations):
        yield (
            "tune moves scales of quantized weights, and static activations depend on them",
            "use tune = 0, or dynamic activations and fewer bits",
        )
    if recipe.static_activations and 8 in recipe.widths and recipe.codebook == "lut":
        yield (
            "a free codebook of 8 bits does not fit the integers that static activations multiply",
            "use codebook = 'uniform', or fewer bits",
        )
    if recipe.smooth and not recipe.static_activations:
        yield (
            "smooth has no use without static activations",
            "use activation_scales = 'static', or smooth = 0",
        )
    if recipe.smooth and (recipe.fold_input_scales or recipe.premultiply_scales):
        yield "smooth needs an input scale of its own on down_proj", "keep the input scales"
    if recipe.scales == "group" and (recipe.tunes or recipe.static_activations):
        yield (
            "scales of groups are for dynamic or float activations, and are not tuned",
            "use scales = 'balanced', or tune = 0 and activation_scales = 'dynamic'",
        )
    if recipe.tune and recipe.tune_minutes:
        yield f"tune is {recipe.tune} steps and tune_minutes {recipe.tune_minutes:g}", "use one of them"
    if recipe.learn and recipe.r1 == "none" and recipe.r2 == "none":
        yield "learn has no rotation to start from", "choose r1 or r2"
