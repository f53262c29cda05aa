"""RoPE's tables for a lowered model, whose prompts all read the same ones."""

from __future__ import annotations

import torch
from torch import Tensor

from anequant.architectures.spec import ModelSpec
from anequant.errors import UnsupportedError
from anequant.reference.forward import ReferenceModel, check_window


def compute_rope_tables(spec: ModelSpec, context: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin [context, head_dim] that hold for every prompt of up to `context` tokens.

    Raises UnsupportedError where RoPE depends on the prompt's length (dynamic and longrope beyond the
    original context), or covers only a part of the head, or attention slides within the context.
    """
    check_window(spec, context)
    model = ReferenceModel(spec, torch.float32)
    cos, sin = model.rope_tables(context)
    short = max(1, min(context, 8))
    short_cos, _ = ReferenceModel(spec, torch.float32).rope_tables(short)
    if not torch.equal(short_cos, cos[:, :short]):
        raise UnsupportedError(
            f"this model's RoPE changes with the prompt's length within {context} tokens",
            remedy="choose a context of at most the model's original one",
        )
    if cos.shape[-1] != spec.head_dim:
        raise UnsupportedError(f"RoPE turns {cos.shape[-1]} of {spec.head_dim} coordinates, all are needed")
    return cos[0], sin[0]
