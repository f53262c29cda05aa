"""The constants of a package, each counted once, from its program alone: the weight file is not read.

The functions of a package share what lies at one place of the weight file. A constant that a constexpr
operation expands is one constant, with all that it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.targets.coreml.graph import Graph, Node
from anequant.targets.coreml.interpreter.constant_store import convert_form
from anequant.targets.coreml.interpreter.operators import OPERATORS
from anequant.targets.coreml.interpreter.supported import read_parameters
from anequant.targets.coreml.signatures import TensorSpec, read_constant_spec
from anequant.targets.coreml.storage import DATA_TYPES, TORCH_TYPES, Value

DENSE = "dense"
MULTIPLIED, LOOKED_UP = "multiplied", "looked up"
USES = {
    ("conv", "weight"): MULTIPLIED,
    ("linear", "weight"): MULTIPLIED,
    ("matmul", "y"): MULTIPLIED,
    ("gather", "x"): LOOKED_UP,
}
"""What operations do with a constant, by the input that takes it."""

WIDTHS = {dtype.name: dtype.bits for dtype in DATA_TYPES.values()}

DATA = ("indices", "data", "nonzero_data", "quantized_data")
"""What constexpr operations call the input that has an entry for every value."""


@dataclass(frozen=True)
class Constant:
    """A constant in the weight file.

    kind     dense, or the constexpr operation without that word
    dtype    of what is stored for each value; `bits` is its width
    bytes    with scales and tables
    tables   lookup tables and `entries` in each; 0 without
    use      multiplied, looked up (its rows), or empty for all else
    place    offset in the weight file
    """

    name: str
    function: str
    kind: str
    dtype: str
    bits: int
    shape: tuple[int | None, ...]
    bytes: int
    tables: int
    entries: int
    use: str
    place: int

    @property
    def values(self) -> int:
        return math.prod(size or 0 for size in self.shape)


def list_constants(graphs: Sequence[Graph]) -> list[Constant]:
    """List the constants of all functions, in order; immediate values and strings are left out."""
    found: dict[int, Constant] = {}
    for graph in graphs:
        inner = {id(source) for node in graph.nodes for source in _list_sources(graph, node)}
        for node in graph.nodes:
            constant = _read_constant(graph, node) if node.constant and id(node) not in inner else None
            if constant is not None:
                found.setdefault(constant.place, constant)
    return list(found.values())


def find_constant(graphs: Sequence[Graph], name: str) -> tuple[Graph, Node] | None:
    """Find the const or constexpr operation whose value has that name, in the first function that has one."""
    for graph in graphs:
        node = graph.producer.get(name)
        if node is not None and node.constant:
            return graph, node
    return None


def load_constant(graph: Graph, node: Node) -> Value:
    """Read the value of a const or constexpr operation: a tensor, a string, or codes and tables.

    Raises UnsupportedError for a constexpr operation that the interpreter does not know.
    """
    if node.kind == "const":
        return graph.literal(node)
    if node.kind not in OPERATORS:
        raise UnsupportedError(f"{node.kind} of '{node.name}' cannot be read")
    takes, arguments = read_parameters(node.kind), {}
    for name in node.inputs:
        source = graph.source(node, name)
        value = graph.value(node, name) if source is None else load_constant(graph, source)
        if value is None or name not in takes:
            raise UnsupportedError(f"input '{name}' of {node.kind} '{node.name}' cannot be read")
        arguments[name] = convert_form(value, takes[name].form)
    value = OPERATORS[node.kind](**arguments)
    return value.to(TORCH_TYPES[node.outputs[0].dtype]) if isinstance(value, Tensor) else value


def _list_sources(graph: Graph, node: Node) -> list[Node]:
    """List the operations that a constexpr operation is made of."""
    if not node.kind.startswith("constexpr_"):
        return []
    return [source for name in node.inputs if (source := graph.source(node, name)) is not None]


def _read_constant(graph: Graph, node: Node) -> Constant | None:
    parts = list(_read_parts(graph, node))
    main, place = parts[0] if parts else (None, None)
    if main is None or place is None:
        return None
    shape, lut = node.outputs[0].shape, _find_table(graph, node)
    return Constant(
        node.name,
        graph.function,
        DENSE if node.kind == "const" else node.kind.removeprefix("constexpr_"),
        main.dtype,
        _count_bits(main),
        shape,
        sum(math.prod(size or 0 for size in part.shape) * _count_bits(part) // 8 for part, _ in parts),
        math.prod(size or 0 for size in lut[:-2]) if lut else 0,
        int(lut[-2] or 0) if lut else 0,
        _find_use(graph, node),
        place,
    )


def _read_parts(graph: Graph, node: Node) -> Iterator[tuple[TensorSpec, int | None]]:
    """Yield what is stored of a constant, and where; what has an entry for every value comes first."""
    if node.kind == "const":
        yield _read_spec(node.proto.attributes["val"]), _find_place(node.proto.attributes["val"])
        return
    for name in sorted(node.inputs, key=lambda name: (name not in DATA, name)):
        source = graph.source(node, name)
        if source is not None:
            yield from _read_parts(graph, source)
        elif node.inputs[name] == (None,):
            value = node.proto.inputs[name].arguments[0].value
            yield _read_spec(value), _find_place(value)


def _find_table(graph: Graph, node: Node) -> tuple[int | None, ...]:
    """Find the shape (.., entries, width) of the lookup tables that a constant is made of; () without."""
    if "lut" in node.inputs:
        return graph.shape(node, "lut")
    return next((shape for source in _list_sources(graph, node) if (shape := _find_table(graph, source))), ())


def _find_use(graph: Graph, constant: Node) -> str:
    users = [(user, name) for user in graph.consumers(constant) for name in user.inputs]
    uses = (USES.get((user.kind, name), "") for user, name in users if graph.source(user, name) is constant)
    return next((use for use in uses if use), "")


def _read_spec(value: Any) -> TensorSpec:
    return read_constant_spec("", value.type)


def _count_bits(spec: TensorSpec) -> int:
    return WIDTHS[spec.dtype]


def _find_place(value: Any) -> int | None:
    return value.blobFileValue.offset if value.WhichOneof("value") == "blobFileValue" else None
