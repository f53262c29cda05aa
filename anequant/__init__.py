"""Quantize Hugging Face LLMs for Apple's Neural Engine.

Importing the package registers its quantizer with transformers, now or when transformers is imported.

    convert(model, output)       a model quantized, lowered, verified and reported on
    quantize(model, output)      a model as a quantized checkpoint
    lower(checkpoint, output)    a checkpoint as Core ML packages
    verify(folder)               whether what was written is what was meant
    evaluate(model, text)        perplexity, and the divergence from a float model
    load(folder)                 the transformers model of a checkpoint
    QuantizedCache(config)       a KV cache of small integers, for a checkpoint that asks for one
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from anequant.api import convert, evaluate, lower, quantize, verify
    from anequant.runtime.cache import QuantizedCache
    from anequant.runtime.transformers_backend import load

__all__ = ["QuantizedCache", "convert", "evaluate", "load", "lower", "quantize", "verify"]

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
"""Idle threads sleep, torch's and numpy's. Spinning ones take the cores from each other: they make small
operations 5 times slower on a busy machine, and a calibrated conversion of a small model a third slower."""

_PLACES = {
    **dict.fromkeys(("convert", "evaluate", "lower", "quantize", "verify"), "anequant.api"),
    "load": "anequant.runtime.transformers_backend",
    "QuantizedCache": "anequant.runtime.cache",
}
"""Imported when first used, for they import torch and transformers."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def _register(module: Any) -> None:
    importlib.import_module("anequant.runtime.quantizer")


register_post_import_hook(_register, "transformers.quantizers.auto")
