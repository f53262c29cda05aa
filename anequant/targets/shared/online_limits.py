"""What a lowered model can do beside its weights."""

from __future__ import annotations

from anequant.errors import UnsupportedError
from anequant.quantization.online import Online


def check_online(online: Online, target: str) -> None:
    """Raise UnsupportedError for what a target, by its name, cannot do while a model runs."""
    if online.kv_bits < 16:
        raise UnsupportedError(
            f"a KV cache of {online.kv_bits} bits cannot be lowered: {target} keeps an fp16 state",
            remedy="use kv_bits = 16, or run the checkpoint with transformers",
        )
    if online.activations and online.prefix:
        raise UnsupportedError(
            f"a prefix of {online.prefix} float positions cannot be lowered: the packages compute every "
            "position alike",
            remedy="use activation_prefix = 0, or run the checkpoint with transformers",
        )
    for name, format_ in online.activations.items():
        if format_.bits != 8 or format_.scale is None:
            what = f"{format_.bits}-bit" if format_.bits != 8 else "dynamically scaled"
            raise UnsupportedError(
                f"the {what} input of '{name}' cannot be lowered: {target}'s quantize takes 8 bits and one "
                "fixed scale",
                remedy="use activation_bits = 8 and activation_scales = 'static', or transformers",
            )
