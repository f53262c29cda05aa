"""What a recipe leaves out, and why: a row for everything that stays in float, and what it is not for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.checkpoints.reader import Checkpoint
from anequant.lower_options import LowerOptions
from anequant.recipe import Recipe

MOST_UNCALIBRATED = 4
"""Bits up to which nearest rounding alone loses much of a model's quality."""


@dataclass(frozen=True)
class Kept:
    """Tensors or values, the form they stay in, and the reason."""

    what: str
    form: str
    reason: str


def list_kept(checkpoint: Checkpoint, recipe: Recipe, options: LowerOptions | None) -> tuple[Kept, ...]:
    """List what stays in float of the checkpoint that `recipe` makes, and with `options` of the packages."""
    return (*_weights(checkpoint, recipe), *_activations(checkpoint, recipe, options))


def advise(recipe: Recipe) -> tuple[str, ...]:
    """Say what a recipe is for where that is not to be used: few bits without calibration."""
    width = min(recipe.widths)
    if recipe.feeds_back or width > MOST_UNCALIBRATED:
        return ()
    return (
        f"nearest rounding to {width} bits is for a first look: sizes, packages and speed are right, text is "
        f"not; w{width}-ane calibrates",
    )


def _weights(checkpoint: Checkpoint, recipe: Recipe) -> Iterator[Kept]:
    spec = checkpoint.spec
    for name, bits, key in (
        (EMBEDDING, recipe.embedding_bits, "embedding_bits"),
        (HEAD, recipe.head_bits, "head_bits"),
    ):
        if bits == 16:
            yield Kept(name, "fp16", f"{key} is 16")
    if spec.tied:
        yield Kept(HEAD, "its own copy", "tied to the embedding, and the final norm's gain folds into it")
    if 16 in recipe.widths:
        yield Kept("all projections", "fp16", "bits is 16")
    yield Kept(", ".join((*spec.norms, FINAL_NORM)), "fp16 ones", "their gains fold into the next weights")
    if spec.architecture.head_norms:
        names = ", ".join(spec.architecture.head_norms)
        yield Kept(names, "fp16", "RoPE follows them, so nothing can take their gains")
    biased = [linear.name for linear in spec.architecture.linears if spec.has_bias(linear)]
    if biased:
        yield Kept(f"biases of {', '.join(biased)}", "fp16", "added after the product, as they are")
    known = {*spec.outer_tensors(), *_layer_names(checkpoint)}
    for name in checkpoint.tensors:
        if name not in known:
            yield Kept(name, "left out", "no part of the architecture")


def _layer_names(checkpoint: Checkpoint) -> Iterator[str]:
    spec = checkpoint.spec
    for layer in range(spec.num_layers):
        yield from (layer_prefix(layer) + name for name in spec.layer_tensors())


def _activations(checkpoint: Checkpoint, recipe: Recipe, options: LowerOptions | None) -> Iterator[Kept]:
    if not recipe.quantizes_activations:
        yield Kept("activations", "fp16" if options else "float", "activation_bits is 16")
    for name, bits in recipe.activation_exceptions.items():
        if bits == 16 and recipe.activation_bits < 16:
            yield Kept(f"input of {name}", "float", f"activation_overrides has {name}=16")
    if recipe.quantizes_activations and recipe.activation_prefix:
        positions = f"the first {recipe.activation_prefix} positions"
        yield Kept(positions, "float", f"activation_prefix is {recipe.activation_prefix}")
    if options is not None:
        yield Kept("KV cache", "fp16 state", "Core ML has no smaller state")
    elif recipe.kv_bits == 16:
        yield Kept("KV cache", "float", "kv_bits is 16")
