"""The tensors of a quantized checkpoint, in the order in which one pass over the model yields them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from anequant.architectures.spec import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    INPUT_SCALES,
    ModelSpec,
    Space,
    layer_prefix,
)
from anequant.checkpoints.quantized import list_quantized_tensors
from anequant.checkpoints.writer import Entry
from anequant.recipe import CHOSEN, Recipe


def list_projections(spec: ModelSpec) -> list[str]:
    """Return the full names of the linears of all layers, in file order."""
    layers = range(spec.num_layers)
    return [layer_prefix(layer) + linear.name for layer in layers for linear in spec.architecture.linears]


def allow_widths(name: str, recipe: Recipe) -> tuple[int, ...]:
    """Return the widths that a projection or a table of that full name may get."""
    own = {EMBEDDING: recipe.embedding_bits, HEAD: recipe.head_bits}.get(name, CHOSEN)
    return recipe.widths if own == CHOSEN else (own,)


def list_widest(spec: ModelSpec, recipe: Recipe) -> dict[str, int]:
    """Return the most bits that projections and tables may get, by full name."""
    return {name: max(allow_widths(name, recipe)) for name in (EMBEDDING, *list_projections(spec), HEAD)}


def list_entries(
    spec: ModelSpec, recipe: Recipe, bits: Mapping[str, int], dtype: torch.dtype = torch.float16
) -> list[Entry]:
    """Names, dtypes and shapes of everything `anequant quantize` writes; `bits` are those of projections and
    tables, by full name.

    `dtype` is that of what is not quantized.
    """
    table = (spec.vocab_size, spec.hidden_size)
    entries = _table_entries(EMBEDDING, table, bits[EMBEDDING], dtype)
    for layer in range(spec.num_layers):
        prefix = layer_prefix(layer)
        for name in list_norms(spec):
            size = spec.layer_tensors()[name]
            entries.append(Entry(prefix + name, dtype, size))
        for linear in spec.architecture.linears:
            name = prefix + linear.name
            if bits[name] < 16:
                groups = spec.width(linear.input) // recipe.group_size if recipe.scales == "group" else 1
                entries += _quantized_entries(name, spec.shape(linear), bits[name], bias=True, groups=groups)
                continue
            entries.append(Entry(f"{name}.weight", dtype, spec.shape(linear)))
            if spec.has_bias(linear):
                entries.append(Entry(f"{name}.bias", dtype, (spec.width(linear.output),)))
            if recipe.smooth and linear.input.space is Space.FFN:
                entries.append(Entry(f"{name}.{INPUT_SCALES}", torch.float32, (1, spec.width(linear.input))))
    entries.append(Entry(f"{FINAL_NORM}.weight", dtype, (spec.hidden_size,)))
    return entries + _table_entries(HEAD, table, bits[HEAD], dtype)


def list_norms(spec: ModelSpec) -> list[str]:
    """Return a layer's norm tensors in file order: the folded ones, then those of the heads."""
    return [f"{name}.weight" for name in (*spec.norms, *spec.architecture.head_norms)]


def _table_entries(name: str, shape: tuple[int, int], bits: int, dtype: torch.dtype) -> list[Entry]:
    if bits == 16:
        return [Entry(f"{name}.weight", dtype, shape)]
    return _quantized_entries(name, shape, bits, bias=False)


def _quantized_entries(
    name: str, shape: tuple[int, int], bits: int, *, bias: bool, groups: int = 1
) -> list[Entry]:
    tensors = list_quantized_tensors(name, shape, bits, bias=bias, groups=groups)
    return [Entry(tensor, dtype, size) for tensor, (dtype, size) in tensors.items()]
