"""QuaRot's fusion of a model in memory, by ANEMLL's names of functions, over anequant's rotations."""

from typing import Any

from torch import nn

from anequant.compat.fusion import fuse_model, measure_fusion
from anequant.recipe_files import load_recipe


def apply_quarot_fusion_to_model(model: nn.Module, config: Any) -> dict[str, Any]:
    """Fold the norm gains of a transformers model, then turn its residual stream and its value heads.

    `config.block_size` is the size of the Hadamard blocks (64 without it). The model computes what it did
    before; a head that shares the embedding's weights gets its own.
    """
    block = getattr(config, "block_size", 64)
    recipe = load_recipe(None, {"r1": "block-hadamard", "r1_block": block, "r2": "hadamard"})
    return fuse_model(model, recipe)


def verify_fusion_quality(model: nn.Module, config: Any = None) -> dict[str, float]:
    """How far the fusion moved the logits of the model: relative error, and share of equal top tokens."""
    return measure_fusion(model)
