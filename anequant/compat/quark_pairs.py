"""The file that Quark's ONNX half turns by: what writes and what reads the stream that R1 turns.

    {"R1_pairs": [{"prev_nodes": [...], "norm_node": "...", "next_nodes": [...]}, ...]}

names nodes of an exported graph, for example "/model/layers.0/self_attn/q_proj/MatMul". Here all of that
follows from the architecture, and R1 turns the whole residual stream or nothing. So the file is checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, ModelSpec, Space, layer_prefix
from anequant.checkpoints.reader import read_json
from anequant.errors import UnsupportedError, UsageError, did_you_mean

PAIRS = "R1_pairs"
WRITERS, NORM, READERS = "prev_nodes", "norm_node", "next_nodes"


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
    """The module that a node belongs to: its path without the operator."""
    return ".".join(node.strip("/").split("/")[:-1])
