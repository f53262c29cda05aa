"""Rules about operations, shapes and types."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from anequant.coreml.graph import Graph
from anequant.coreml.lint import ERROR, NOTE, WARNING, Chip, Hit, Rule

INT32_OPERATIONS = {
    *("add", "sub", "concat", "gather", "reduce_argmax", "squeeze", "expand_dims", "reshape", "cast"),
    *("slice_by_index", "select", "greater_equal", "identity"),
}
"""What positions and token ids go through, on the CPU in any case."""

UNSUITED = {
    *("gather_nd", "gather_along_axis", "tile", "non_zero", "while_loop", "cond", "scatter", "scatter_nd"),
    *("one_hot", "cumsum", "sliding_windows", "shape", "fill", "range_1d"),
}
AFTER_CHOICE = {"squeeze", "concat", "reshape", "expand_dims", "cast", "identity"}
SQUARING = {"rsqrt", "reduce_sum_square", "reduce_l2_norm", "reduce_log_sum"}
CHOOSING = {"topk", "reduce_argmax", "argsort"}
LONGEST_GATHER = 65535
NOTCH, MEGABYTE = 16 * 1024, 1 << 20
IDENTIFIER = re.compile(r"[A-Za-z_@][A-Za-z0-9_@]*")


def _rank(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.computing():
        rank = max((len(output.shape) for output in node.outputs), default=0)
        if rank > 4:
            yield Hit(node.name, f"{node.kind} of rank {rank}", ERROR if rank > 5 else None)


def _linears(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("linear", "matmul"):
        names = ("weight",) if node.kind == "linear" else ("x", "y")
        if any((source := graph.source(node, name)) is not None and source.constant for name in names):
            yield Hit(node.name, f"{node.kind} with a constant weight")


def _axes(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.nodes:
        users = graph.consumers(node)
        if node.kind == "const" or (users and all(user.kind == "gather" for user in users)):
            continue
        for output in node.outputs:
            longest = max((size or 0 for size in output.shape), default=0)
            if longest > chip.axis:
                yield Hit(node.name, f"an axis of {longest}, {chip.name} holds {chip.axis}")


def _static(graph: Graph, chip: Chip) -> Iterator[Hit]:
    enumerated = set(graph.spec.enumerated)
    for spec in graph.spec.inputs:
        if None in spec.shape and spec.name not in enumerated:
            yield Hit(spec.name, "an input of any length")
    for node in graph.of_kind(*UNSUITED):
        yield Hit(node.name, f"{node.kind} runs on the CPU", WARNING)


def _elementwise(graph: Graph, chip: Chip) -> Iterator[Hit]:
    heavy = {"conv", "matmul", "linear", "gather", "scaled_dot_product_attention", "conv_transpose"}
    kinds = {node.kind for node in graph.computing()}
    if kinds and not kinds & heavy:
        yield Hit(graph.function, "only elementwise operations")


def _repeated_outputs(graph: Graph, chip: Chip) -> Iterator[Hit]:
    sources: dict[str | None, str] = {}
    for name in graph.outputs:
        node = graph.producer.get(name)
        source = node.inputs["x"][0] if node is not None and node.kind == "identity" else name
        if source in sources:
            yield Hit(name, f"the same tensor as output '{sources[source]}'")
        sources[source] = name


def _notch(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("matmul"):
        shape = graph.shape(node, "y")
        if len(shape) < 2 or None in shape:
            continue
        length, depth = sorted((shape[-1] or 0, shape[-2] or 0), reverse=True)
        payload = -(-length // 16) * depth * 2
        away = min(payload % MEGABYTE, MEGABYTE - payload % MEGABYTE)
        if payload > MEGABYTE // 2 and away < NOTCH:
            yield Hit(node.name, f"an operand of {payload} bytes a core, {away} from a multiple of 1 MiB")


def _types(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.computing():
        types = {output.dtype for output in node.outputs}
        if types & {"fp32", "int64", "fp64"}:
            yield Hit(node.name, f"{node.kind} in {', '.join(sorted(types))}")
        elif "int32" in types and node.kind not in INT32_OPERATIONS:
            yield Hit(node.name, f"{node.kind} in int32", WARNING)


def _long_gather(graph: Graph, chip: Chip) -> Iterator[Hit]:
    alone = not any(node.kind in ("conv", "matmul") for node in graph.nodes)
    for node in graph.of_kind("gather"):
        rows = (graph.shape(node, "x") or (0,))[0] or 0
        if rows > LONGEST_GATHER:
            yield Hit(node.name, f"gather from {rows} rows", NOTE if alone else None)


def _infinities(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("const"):
        if node.outputs and node.outputs[0].dtype in ("fp16", "fp32"):
            value = graph.literal(node)
            if isinstance(value, Tensor) and value.numel() and bool(torch.isinf(value).any()):
                yield Hit(node.name, "a constant with infinities")


def _silu(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("silu", "softplus"):
        yield Hit(node.name, f"{node.kind} is off by up to 1.5e-2 where its input is large")


def _norms(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(*SQUARING):
        yield Hit(node.name, f"{node.kind}: squares overflow float16 at 256")
    for node in graph.of_kind("layer_norm"):
        source = graph.source(node, "x")
        if source is None or source.kind != "concat":
            yield Hit(node.name, "layer_norm of something else than concat(x, -x)", NOTE)


def _attention(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("scaled_dot_product_attention"):
        yield Hit(node.name, "scaled_dot_product_attention")


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


def _identifiers(graph: Graph, chip: Chip) -> Iterator[Hit]:
    names = [output.name for node in graph.nodes for output in node.outputs]
    names += [spec.name for spec in (*graph.spec.inputs, *graph.spec.states)]
    for name in names:
        if not IDENTIFIER.fullmatch(name):
            yield Hit(name, f"'{name}' is no identifier")


GRAPH_RULES = (
    Rule(
        "S1",
        WARNING,
        "the engine's tensors have four axes (Apple, ml-ane-transformers)",
        "reshape to rank 4",
        _rank,
    ),
    Rule(
        "S2",
        WARNING,
        "linears run best as 1x1 convolutions on (1, C, 1, S) (Apple, ml-ane-transformers)",
        "emit conv",
        _linears,
    ),
    Rule(
        "S4",
        ERROR,
        "axes are limited by generation (hal_analysis of the H13 to H16 engines)",
        "split the axis",
        _axes,
    ),
    Rule(
        "S6",
        ERROR,
        "shapes must be static; dynamic operations fall to the CPU",
        "fix or enumerate shapes",
        _static,
    ),
    Rule(
        "S7",
        WARNING,
        "graphs of elementwise operations alone go to the CPU",
        "join it with a neighbour",
        _elementwise,
    ),
    Rule(
        "S7b",
        WARNING,
        "one tensor under two output names fails to compile",
        "return it once",
        _repeated_outputs,
    ),
    Rule(
        "S8",
        WARNING,
        "operands near a multiple of 1 MiB a core load at a third of the rate (stablehlo-coreml, pull 110)",
        "choose another context length",
        _notch,
    ),
    Rule(
        "D1",
        ERROR,
        "the engine computes in float16; anything else runs on the CPU",
        "cast at the border only",
        _types,
    ),
    Rule(
        "D2",
        WARNING,
        "indices are cast to 16 bits beyond 65535 rows (executorch 7616)",
        "keep the table in a package of its own",
        _long_gather,
    ),
    Rule(
        "D3",
        ERROR,
        "-inf in a mask becomes NaN in float16",
        "use -1e4",
        _infinities,
    ),
    Rule(
        "D4",
        NOTE,
        "the engine's table for silu is coarse at large inputs",
        "x/2 (1 + tanh(x/2)) if it matters",
        _silu,
    ),
    Rule(
        "N2",
        WARNING,
        "RMSNorm as layer_norm of concat(x, -x) does not square in float16",
        "use that form",
        _norms,
    ),
    Rule(
        "A1",
        WARNING,
        "the fused attention operation is wrong on iOS 26 (executorch 15833)",
        "emit matmul, softmax, matmul",
        _attention,
    ),
    Rule(
        "A2",
        WARNING,
        "choosing tokens runs on the CPU and splits the graph",
        "choose last",
        _choices,
    ),
    Rule(
        "I1",
        ERROR,
        "Core ML's parser takes identifiers only",
        "use letters, digits and _",
        _identifiers,
    ),
)
