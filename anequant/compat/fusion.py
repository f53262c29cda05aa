"""QuaRot's fusion of a model in memory, and how far its logits moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anequant.errors import UsageError
from anequant.recipe import Recipe
from anequant.rotation.model_in_memory import rotate_in_memory

PROBE = "anequant_probe"
PROBE_TOKENS = 32
PROBE_SEED = 7


def fuse_model(model: torch.nn.Module, recipe: Recipe) -> dict[str, Any]:
    """Fold and rotate a transformers model in place; return what was done, by ANEMLL's keys.

    The model keeps its logits on a few random tokens, for `measure_fusion`. Raises as `rotate_in_memory`.
    """
    generator = torch.Generator().manual_seed(PROBE_SEED)
    config: Any = model.config
    tokens = torch.randint(config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    logits = _logits(model, tokens)
    spec = rotate_in_memory(model, recipe)
    setattr(model, PROBE, (tokens, logits))
    rotates = recipe.r1 != "none" or recipe.r2 != "none"
    return {
        "layers_processed": spec.num_layers,
        "layernorm_fusions": len(spec.norms) * spec.num_layers + 1,
        "hadamard_rotations": len(spec.architecture.linears) * spec.num_layers if rotates else 0,
        "bias_fusions": 0,
        "r1": recipe.r1,
        "r2": recipe.r2,
        "seed": recipe.seed,
    }


def measure_fusion(model: torch.nn.Module) -> dict[str, float]:
    """Return the relative error of a fused model's logits, and its share of equal top tokens.

    Raises UsageError for a model that was not fused.
    """
    if not hasattr(model, PROBE):
        raise UsageError("the model was not fused", remedy="fuse it first")
    tokens, before = getattr(model, PROBE)
    after = _logits(model, tokens)
    return {
        "relative_logit_error": float((after - before).norm() / before.norm()),
        "same_top_token": float((after.argmax(-1) == before.argmax(-1)).double().mean()),
    }


@torch.no_grad()
def _logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens).logits[0].float()
    return logits
