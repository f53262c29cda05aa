"""What a weight is rounded to, in the recipe's words."""

from __future__ import annotations

from dataclasses import dataclass

from anequant.recipe import Recipe


@dataclass(frozen=True)
class WeightFormat:
    """How the codes of one weight [out, in] are read.

    bits      width of a code
    codebook  "uniform": integers; "lut": free entries
    scales    "tensor", "output", "balanced" or "group": who shares a scale
    group     columns that share one where scales is "group"
    """

    bits: int
    codebook: str
    scales: str
    group: int = 0


def linear_format(recipe: Recipe, bits: int) -> WeightFormat:
    """Return the format of a projection of `bits` bits, its input scales folded where the recipe says so."""
    return WeightFormat(bits, recipe.codebook, recipe.linear_scales, recipe.group_size)


def unfolded_format(recipe: Recipe, bits: int) -> WeightFormat:
    """Return the format of a projection that keeps its input scales, also where the recipe folds them."""
    return WeightFormat(bits, recipe.codebook, recipe.scales, recipe.group_size)


def table_format(recipe: Recipe, bits: int) -> WeightFormat:
    """Return the format of the embedding or the head: a scale per row."""
    return WeightFormat(bits, recipe.codebook, "output")
