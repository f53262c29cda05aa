"""Rules about shapes and the form of operations."""

from __future__ import annotations

from collections.abc import Iterator

from anequant.targets.coreml.graph import Graph
from anequant.targets.coreml.lint.chips import Chip
from anequant.targets.shared.finding import ERROR, NOTE, WARNING, Hit, rule

UNSUITED = {
    *("gather_nd", "gather_along_axis", "tile", "non_zero", "while_loop", "cond", "scatter", "scatter_nd"),
    *("one_hot", "cumsum", "sliding_windows", "shape", "fill", "range_1d"),
}
POSITIONS = {"slice_by_index": ("begin", "end"), "slice_by_size": ("begin", "size"), "reshape": ("shape",)}
"""Inputs that make an operation dynamic when they are computed."""

WIDEST_KERNEL = 15
ROW = 32
"""Float16 values in the 64 bytes that a last axis is padded to."""

NOTCH, MEGABYTE = 16 * 1024, 1 << 20


@rule("S1", WARNING, "the engine's tensors have four axes (Apple, ml-ane-transformers)", "reshape to rank 4")
def _rank(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.computing():
        rank = max((len(output.shape) for output in node.outputs), default=0)
        if rank > 4:
            yield Hit(node.name, f"{node.kind} of rank {rank}", ERROR if rank > 5 else None)


@rule(
    "S2",
    WARNING,
    "linears run best as 1x1 convolutions on (1, C, 1, S) (Apple, ml-ane-transformers)",
    "emit conv",
)
def _linears(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("linear", "matmul"):
        names = ("weight",) if node.kind == "linear" else ("x", "y")
        if any((source := graph.source(node, name)) is not None and source.constant for name in names):
            yield Hit(node.name, f"{node.kind} with a constant weight")


@rule(
    "S3",
    NOTE,
    'last axes are padded to 64 bytes (Apple, "Deploying Transformers on the Apple Neural Engine")',
    "choose a multiple of 32",
)
def _alignment(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("conv", "matmul"):
        for name in ("x", "y"):
            source, shape = graph.source(node, name), graph.shape(node, name)
            length = (shape[-1] or 0) if shape else 0
            if not (source is not None and source.constant) and length > 1 and length % ROW:
                yield Hit(
                    node.name, f"{node.kind} of a last axis of {length}, held as {-(-length // ROW) * ROW}"
                )


@rule(
    "S4", ERROR, "axes are limited by generation (hal_analysis of the H13 to H16 engines)", "split the axis"
)
def _axes(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.nodes:
        users = graph.consumers(node)
        if node.kind == "const" or (users and all(user.kind == "gather" for user in users)):
            continue
        for output in node.outputs:
            longest = max((size or 0 for size in output.shape), default=0)
            if longest > chip.axis:
                yield Hit(node.name, f"an axis of {longest}, {chip.name} holds {chip.axis}")


@rule("S6", ERROR, "shapes must be static; dynamic operations fall to the CPU", "fix or enumerate shapes")
def _static(graph: Graph, chip: Chip) -> Iterator[Hit]:
    enumerated = set(graph.spec.enumerated)
    for spec in graph.spec.inputs:
        if None in spec.shape and spec.name not in enumerated:
            yield Hit(spec.name, "an input of any length")
    for node in graph.of_kind(*UNSUITED):
        yield Hit(node.name, f"{node.kind} runs on the CPU", WARNING)
    for node in graph.of_kind(*POSITIONS):
        sources = [graph.source(node, name) for name in POSITIONS[node.kind]]
        if any(source is not None and not source.constant for source in sources):
            yield Hit(node.name, f"{node.kind} at computed positions", WARNING)
    for node in graph.of_kind("conv"):
        width = (graph.shape(node, "weight") or (0,))[-1] or 0
        if width > WIDEST_KERNEL:
            yield Hit(node.name, f"a kernel of width {width}, the engine takes {WIDEST_KERNEL}", WARNING)


@rule("S7", WARNING, "graphs of elementwise operations alone go to the CPU", "join it with a neighbour")
def _elementwise(graph: Graph, chip: Chip) -> Iterator[Hit]:
    heavy = {"conv", "matmul", "linear", "gather", "scaled_dot_product_attention", "conv_transpose"}
    kinds = {node.kind for node in graph.computing()}
    if kinds and not kinds & heavy:
        yield Hit(graph.function, "only elementwise operations")


@rule("S7b", WARNING, "one tensor under two output names fails to compile", "return it once")
def _repeated_outputs(graph: Graph, chip: Chip) -> Iterator[Hit]:
    sources: dict[str | None, str] = {}
    for name in graph.outputs:
        node = graph.producer.get(name)
        source = node.inputs["x"][0] if node is not None and node.kind == "identity" else name
        if source in sources:
            yield Hit(name, f"the same tensor as output '{sources[source]}'")
        sources[source] = name


@rule(
    "S8",
    WARNING,
    "operands near a multiple of 1 MiB a core load at a third of the rate (stablehlo-coreml, pull 110)",
    "choose another context length",
)
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


SHAPE_RULES = (_rank, _linears, _alignment, _axes, _static, _elementwise, _repeated_outputs, _notch)
