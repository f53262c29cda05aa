"""ANEMLL's and AMD Quark's words for a quantization, as recipes; and the lines ANEMLL's log ends in.

Both name a scheme, an optimization before it, and a JSON file that says how to rotate. Quark's ONNX half says
r_matrix_dim, use_random_had and r_config_path there, its torch half online-had: R3 where the cache is
quantized, R4 where activations are.

r_config_path is a file of what writes and what reads the stream that R1 rotates:

    {"R1_pairs": [{"prev_nodes": [...], "norm_node": "...", "next_nodes": [...]}, ...]}

names nodes of an exported graph, for example "/model/layers.0/self_attn/q_proj/MatMul". Here all of that
follows from the architecture, and R1 rotates the whole residual stream or nothing. So the file is checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.architectures import read_spec
from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, ModelSpec, Space, layer_prefix
from anequant.checkpoints.reader import read_config, read_json
from anequant.checkpoints.source import resolve_source
from anequant.compat.words import QUARK_WORDS, check_words
from anequant.errors import UnsupportedError, UsageError, did_you_mean
from anequant.pipeline.quantizing import QuantizeResult
from anequant.recipe import Recipe
from anequant.recipe_files import load_recipe
from anequant.rotation.hadamard import power_of_two_divisors

QUAROT, NONE = "quarot", "none"
OPTIMIZATIONS = (QUAROT, NONE)
BLOCKS: Mapping[str, Any] = {"r1": "block-hadamard", "r2": "hadamard"}
"""What quarot means to ANEMLL."""
WHOLE: Mapping[str, Any] = {"r1": "hadamard", "r2": "hadamard"}
"""What it means to Quark."""
UNROTATED: Mapping[str, Any] = {"r1": "none", "r2": "none", "r3": "none", "r4": "none"}

PAIRS = "R1_pairs"
WRITERS, NORM, READERS = "prev_nodes", "norm_node", "next_nodes"


@dataclass(frozen=True)
class PublishedRecipe:
    """A recipe, and what the published words asked for that has no effect on it."""

    recipe: Recipe
    notes: tuple[str, ...]


def translate_recipe(
    scheme: str,
    optimization: str,
    config: Path | None,
    model: str,
    *,
    rotated: Mapping[str, Any],
    premultiply: bool = False,
) -> PublishedRecipe:
    """Return `scheme` (a published one or any recipe) for `model`, rotated as optimization and file say.

    `rotated` is what quarot means without a word in the file. The model's config is read only where the
    file names sizes or nodes.

    Raises UsageError for an unknown scheme, optimization or key, InputError for a file that cannot be
    read, UnsupportedError for a value with no counterpart.
    """
    if optimization not in OPTIMIZATIONS:
        raise UsageError(
            f"unknown optimization '{optimization}'", remedy=did_you_mean(optimization, OPTIMIZATIONS)
        )
    if optimization == NONE and config is not None:
        raise UsageError(f"'{config}' says how to rotate, and the optimization is '{NONE}'")
    values, notes = ({}, ()) if config is None else _read_config(config)
    overrides = dict(rotated if optimization == QUAROT else UNROTATED)
    if config is not None:
        overrides |= _residual_rotation(values, config, model)
    if "seed" in values:
        overrides["seed"] = values["seed"]
    if premultiply:
        overrides["premultiply_scales"] = True
    if "online-had" in values:
        recipe = load_recipe(scheme, overrides)
        overrides |= _online_rotations(recipe, values["online-had"])
        if values["online-had"] and overrides["r3"] == overrides["r4"] == "none":
            notes += (f"{scheme} keeps activations and cache in float: no use for online-had",)
    recipe = load_recipe(scheme, overrides)
    if not recipe.calibrated:
        notes += (f"{scheme} rounds to the nearest: no use for calibration data",)
    return PublishedRecipe(recipe, notes)


def _read_config(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise UsageError(f"QuaRot file '{path}' holds no table of keys and values")
    return values, check_words(values, QUARK_WORDS, path)


def _online_rotations(recipe: Recipe, wanted: bool) -> dict[str, Any]:
    """Return R3 and R4 where they serve something, over their whole widths."""
    used = {"r3": recipe.kv_bits < 16, "r4": recipe.quantizes_activations}
    return {key: "hadamard" if wanted and use else "none" for key, use in used.items()}


def _residual_rotation(values: Mapping[str, Any], path: Path, model: str) -> dict[str, Any]:
    """Return R1 as `block_size` or `r_matrix_dim` say, after a check of what `r_config_path` names."""
    if "block_size" in values and "r_matrix_dim" in values:
        raise UsageError(f"'{path}' has both 'block_size' and 'r_matrix_dim'", remedy="leave one of them out")
    if "r_config_path" in values:
        check_pairs(path.parent / values["r_config_path"], _read_spec(model))
    if "block_size" in values:
        return {"r1": "block-hadamard", "r1_block": values["block_size"]}
    if "r_matrix_dim" not in values:
        return {}
    size, width = values["r_matrix_dim"], _read_spec(model).hidden_size
    if size == width:
        return {"r1": "hadamard"}
    blocks = power_of_two_divisors(width)[1:]
    if size not in blocks:
        raise UnsupportedError(
            f"key 'r_matrix_dim' in '{path}' is {size}, the model's width {width}",
            remedy=f"use {width}, or one of {', '.join(map(str, blocks))} for blocks",
        )
    return {"r1": "block-hadamard", "r1_block": size}


def _read_spec(model: str) -> ModelSpec:
    folder = resolve_source(model).folder
    return read_spec(read_config(folder), str(folder / "config.json"))


def check_pairs(path: Path, spec: ModelSpec) -> None:
    """Check that the pairs are the linears and norms of `spec`, none missing and none beside them.

    Raises UsageError for a file of another form, UnsupportedError naming the node, InputError when the
    file cannot be read.
    """
    pairs = _read_pairs(path)
    named: dict[str, set[str]] = {WRITERS: set(), NORM: set(), READERS: set()}
    for pair in pairs:
        for key, nodes in pair.items():
            named[key].update([nodes] if isinstance(nodes, str) else nodes)
    for key, expected in _expected(spec).items():
        modules = {_module(node): node for node in sorted(named[key])}
        for module, node in modules.items():
            if module not in expected:
                raise UnsupportedError(
                    f"'{key}' in '{path}' names '{node}', which is none of the model's",
                    remedy="name nodes as /model/layers.0/self_attn/o_proj/MatMul",
                )
        for module in sorted(expected - modules.keys()):
            raise UnsupportedError(
                f"'{key}' in '{path}' leaves out '{module}'", remedy="R1 turns the whole residual stream"
            )


def _read_pairs(path: Path) -> list[dict[str, Any]]:
    values = read_json(path)
    pairs = values.get(PAIRS) if isinstance(values, dict) else None
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise UsageError(f"'{path}' holds no list of '{PAIRS}'")
    known = (WRITERS, NORM, READERS)
    for table, keys in ((values, (PAIRS,)), *((pair, known) for pair in pairs)):
        for key in table:
            if key not in keys:
                raise UsageError(f"unknown key '{key}' in '{path}'", remedy=did_you_mean(key, keys))
    for pair in pairs:
        for key, nodes in pair.items():
            listed = [nodes] if key == NORM else nodes
            if not isinstance(listed, list) or not all(isinstance(node, str) for node in listed):
                raise UsageError(f"'{key}' in '{path}' must hold names of nodes")
    return pairs


def _expected(spec: ModelSpec) -> dict[str, set[str]]:
    prefixes = [layer_prefix(layer) for layer in range(spec.num_layers)]
    linears = spec.architecture.linears
    writers = [linear.name for linear in linears if linear.output.space is Space.RESIDUAL]
    readers = [linear.name for linear in linears if linear.input.space is Space.RESIDUAL]
    return {
        WRITERS: {EMBEDDING, *(prefix + name for prefix in prefixes for name in writers)},
        NORM: {FINAL_NORM, *(prefix + name for prefix in prefixes for name in spec.norms)},
        READERS: {HEAD, *(prefix + name for prefix in prefixes for name in readers)},
    }


def _module(node: str) -> str:
    """Return the module that a node belongs to: its path without the operator."""
    return ".".join(node.strip("/").split("/")[:-1])


def closing_lines(output: Path, result: QuantizeResult) -> list[str]:
    """Return the end of the published log: a line for every width, the one of most tensors last."""
    widths = Counter(tensor.bits for tensor in result.rounding.tensors)
    counts = sorted(widths.items(), key=lambda item: (item[1], item[0]))
    return [
        f"Quantization complete! Model saved to {output}",
        *(f"Quantized {count} layers with {bits}-bit precision" for bits, count in counts),
    ]
