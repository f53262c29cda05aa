"""Rules about types, norms, attention and names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from anequant.quantization.nearest import LARGEST_FLOAT16
from anequant.targets.coreml.graph import Graph
from anequant.targets.coreml.lint.chips import Chip
from anequant.targets.shared.finding import ERROR, NOTE, WARNING, Hit, rule

INT32_OPERATIONS = {
    *("add", "sub", "concat", "gather", "reduce_argmax", "squeeze", "expand_dims", "reshape", "cast"),
    *("slice_by_index", "select", "greater_equal", "identity"),
}
"""What positions and token ids go through, on the CPU in any case."""

AFTER_CHOICE = {"squeeze", "concat", "reshape", "expand_dims", "cast", "identity"}
SQUARING = {"rsqrt", "reduce_sum_square", "reduce_l2_norm", "l2_norm"}
CHOOSING = {"topk", "reduce_argmax", "argsort"}
LONGEST_GATHER = 65535
IDENTIFIER = re.compile(r"[A-Za-z_@][A-Za-z0-9_@]*")


@rule("D1", ERROR, "the engine computes in float16; anything else runs on the CPU", "cast at the border only")
def _types(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.computing():
        types = {output.dtype for output in node.outputs}
        if node.kind == "cast" and node.name in graph.outputs:
            continue
        if types & {"fp32", "int64", "fp64"}:
            yield Hit(node.name, f"{node.kind} in {', '.join(sorted(types))}")
        elif "int32" in types and node.kind not in INT32_OPERATIONS:
            yield Hit(node.name, f"{node.kind} in int32", WARNING)


@rule(
    "D2",
    WARNING,
    "indices are cast to 16 bits beyond 65535 rows (executorch 7616)",
    "keep the table in a package of its own",
)
def _long_gather(graph: Graph, chip: Chip) -> Iterator[Hit]:
    alone = not any(node.kind in ("conv", "matmul") for node in graph.nodes)
    for node in graph.of_kind("gather"):
        shape, axis = graph.shape(node, "x") or (0,), graph.value(node, "axis")
        rows = shape[int(axis) if isinstance(axis, Tensor) else 0] or 0
        if rows > LONGEST_GATHER:
            yield Hit(node.name, f"gather from {rows} rows", NOTE if alone else None)


@rule("D3", ERROR, "an infinite mask value becomes NaN in softmax", "use -1e4")
def _infinities(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("const"):
        if node.outputs and node.outputs[0].dtype in ("fp16", "fp32"):
            value = graph.literal(node)
            if not isinstance(value, Tensor) or not value.numel():
                continue
            if bool(torch.isinf(value).any()):
                yield Hit(node.name, "a constant with infinities")
            elif float(value.min()) <= -LARGEST_FLOAT16:
                yield Hit(node.name, "a constant at float16's end, infinite with any score below it", WARNING)


@rule(
    "D4", NOTE, "the engine's table for silu is coarse at large inputs", "x/2 (1 + tanh(x/2)) if it matters"
)
def _silu(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("silu", "softplus"):
        yield Hit(node.name, f"{node.kind} is off by up to 1.5e-2 where its input is large")


@rule("N2", WARNING, "RMSNorm as layer_norm of concat(x, -x) does not square in float16", "use that form")
def _norms(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(*SQUARING):
        yield Hit(node.name, f"{node.kind}: squares overflow float16 at 256")
    for node in graph.of_kind("layer_norm"):
        source = graph.source(node, "x")
        if source is None or source.kind != "concat":
            yield Hit(node.name, "layer_norm of something else than concat(x, -x)", NOTE)


@rule(
    "N3",
    NOTE,
    "attention weights near zero lose 4 to 5 % in the product (cadamcat, attention-product-precision)",
    "multiply the weights by 64 and divide the product",
)
def _tiny_weights(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("matmul"):
        source = graph.source(node, "x")
        if source is not None and source.kind == "softmax":
            yield Hit(node.name, "softmax straight into matmul")


@rule(
    "Q1",
    WARNING,
    "one scale a tensor, and a gain from a17 and m4 on only (Apple, opt-quantization-perf)",
    "keep activations in float16",
)
def _activations(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("quantize"):
        scales = graph.shape(node, "scale")
        if any((size or 0) > 1 for size in scales):
            yield Hit(node.name, f"activations with scales of shape {list(scales)}, the engine takes one")
        elif not chip.w8a8:
            yield Hit(node.name, f"8-bit activations, slower than float16 on {chip.name}")


@rule(
    "A1",
    WARNING,
    "the fused attention operation is wrong on iOS 26 (executorch 15833)",
    "emit matmul, softmax, matmul",
)
def _attention(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("scaled_dot_product_attention"):
        yield Hit(node.name, "scaled_dot_product_attention")


@rule("A2", WARNING, "choosing tokens runs on the CPU and splits the graph", "choose last")
def _choices(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(*CHOOSING):
        later, seen = graph.consumers(node), set()
        while later:
            user = later.pop()
            if user.kind not in AFTER_CHOICE:
                yield Hit(node.name, f"{node.kind} before {user.kind}")
                break
            if user.name not in seen:
                seen.add(user.name)
                later += graph.consumers(user)


@rule(
    "I1",
    ERROR,
    "Core ML's parser takes identifiers only, each once in a function",
    "use letters, digits and _",
)
def _identifiers(graph: Graph, chip: Chip) -> Iterator[Hit]:
    names = [graph.function, *(output.name for node in graph.nodes for output in node.outputs)]
    names += [spec.name for spec in (*graph.spec.inputs, *graph.spec.states)]
    for name in names:
        if not IDENTIFIER.fullmatch(name):
            yield Hit(name, f"'{name}' is no identifier")
    for name, count in Counter(names).items():
        if count > 1:
            yield Hit(name, f"{count} values are called '{name}'")


GRAPH_RULES = (
    _types,
    _long_gather,
    _infinities,
    _silu,
    _norms,
    _tiny_weights,
    _activations,
    _attention,
    _choices,
    _identifiers,
)
