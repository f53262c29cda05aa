"""A transformers model in memory, folded and rotated in place."""

from __future__ import annotations

from typing import Any

import torch

from anequant.architectures import read_spec
from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, HEAD_LINEAR, ModelSpec, layer_prefix
from anequant.recipe import Recipe
from anequant.rotation.fold import fold_and_rotate_layer, fold_and_rotate_linear, rotate_embedding
from anequant.rotation.rotation_plan import plan_rotations


@torch.no_grad()
def rotate_in_memory(model: torch.nn.Module, recipe: Recipe) -> ModelSpec:
    """Fold every norm gain of a causal language model and rotate it by the recipe's R1 and R2.

    A tied head gets weights of its own, since the final gain goes into the head only. Computed in float64
    and rounded to the model's dtype. Raises UnsupportedError for an architecture that is not known, and
    what `plan_rotations` raises.
    """
    config: Any = model.config
    spec = read_spec(config.to_dict(), "the model's config")
    plan = plan_rotations(spec, recipe)
    if spec.tied:
        model.get_submodule(HEAD).weight = torch.nn.Parameter(model.get_parameter(f"{HEAD}.weight").clone())
        config.tie_word_embeddings = False
    gain = model.get_parameter(f"{FINAL_NORM}.weight")
    head = model.get_parameter(f"{HEAD}.weight")
    rotated = {
        f"{EMBEDDING}.weight": rotate_embedding(model.get_parameter(f"{EMBEDDING}.weight"), plan),
        f"{HEAD}.weight": fold_and_rotate_linear(HEAD_LINEAR, head, None, gain, plan, None)[0],
        f"{FINAL_NORM}.weight": torch.ones_like(gain),
    }
    for name, tensor in rotated.items():
        model.get_parameter(name).copy_(tensor)
    for layer in range(spec.num_layers):
        prefix = layer_prefix(layer)
        tensors = {name: model.get_parameter(prefix + name) for name in spec.layer_tensors()}
        for name, tensor in fold_and_rotate_layer(spec, tensors, plan, layer).items():
            tensors[name].copy_(tensor)
    return spec
