"""What Apple's parser reads of an asset, as JSON: functions, operations, types, and constants where small.

    functions    name, public, inputs and outputs ([name, type]), values (each one's type, a number in types),
                 operations ([kind, operands, results], and what is known of a constant)
    types        as MLIR prints them

Values are numbered in a function, its arguments first; operations of nested regions follow the one that they
belong to. A constant has a `name` where it lies among the file's blobs, else its numbers where they are few,
and their range.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anequant.targets.coreai.coreai_toolkit import (
    AIModelAsset,
    ArrayAttr,
    DenseElementsAttr,
    DenseResourceElementsAttr,
    DictAttr,
    StringAttr,
    TypeAttr,
)

GRAPH, CONSTANT = "coreai.graph", "coreai.constant"
HELPERS = ("priv", "composite_decl")
"""Attributes of functions that others call: no host finds the first, the second are forms that are copied."""

MOST_NUMBERS = 64
READABLE = re.compile(r"[su]?i(1|8|16|32|64)|f(16|32|64)")
"""Types of which constants can be looked into."""

RESOURCE = re.compile(r'dense_resource<"?([^">]+)"?>')


def describe(asset: Path, target: Path) -> None:
    """Write the description of an asset to a file."""
    module = AIModelAsset.load(str(asset)).program._module._mlir_module
    types: dict[str, int] = {}
    functions = [_describe_function(graph, types) for graph in _find_graphs(module.operation)]
    target.write_text(json.dumps({"functions": functions, "types": list(types)}), encoding="utf-8")


def _find_graphs(operation: Any) -> Iterator[Any]:
    """The functions in an operation, those in functions not among them."""
    for inner in _list_inner(operation):
        if inner.name == GRAPH:
            yield inner
        else:
            yield from _find_graphs(inner)


def _list_inner(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation


def _describe_function(graph: Any, types: dict[str, int]) -> dict[str, Any]:
    function = _Function(types)
    function.walk(graph)
    kinds = TypeAttr(graph.attributes["function_type"]).value
    return {
        "name": _read_text(graph, "sym_name"),
        "public": not any(key in graph.attributes for key in HELPERS),
        "inputs": _name_ports(graph, "arg_attrs", kinds.inputs),
        "outputs": _name_ports(graph, "res_attrs", kinds.results),
        "values": function.values,
        "operations": function.operations,
    }


def _read_text(operation: Any, key: str) -> str:
    found = operation.attributes
    return StringAttr(found[key]).value if key in found else ""


def _name_ports(graph: Any, key: str, kinds: Any) -> list[list[str]]:
    """[name, type] of each; "" for one without a name."""
    found = graph.attributes
    attributes = [DictAttr(item) for item in ArrayAttr(found[key])] if key in found else []
    names = [StringAttr(item["coreai.name"]).value if "coreai.name" in item else "" for item in attributes]
    names += [""] * (len(kinds) - len(names))
    return [[name, str(kind)] for name, kind in zip(names, kinds, strict=True)]


class _Function:
    """The values of a function and its operations, as they are come upon."""

    def __init__(self, types: dict[str, int]) -> None:
        self._types = types
        self._numbers: dict[Any, int] = {}
        self.values: list[int] = []
        self.operations: list[list[Any]] = []

    def walk(self, operation: Any) -> None:
        """Take all that is in an operation."""
        for region in operation.regions:
            for block in region:
                self._add(block.arguments)
                for view in block:
                    inner = view.operation
                    operands = [self._numbers[value] for value in inner.operands if value in self._numbers]
                    entry = [inner.name, operands, self._add(inner.results)]
                    if inner.name == CONSTANT:
                        entry.append(_describe_constant(inner))
                    self.operations.append(entry)
                    self.walk(inner)

    def _add(self, found: Any) -> list[int]:
        numbers = []
        for value in found:
            self._numbers[value] = len(self.values)
            numbers.append(len(self.values))
            self.values.append(self._types.setdefault(str(value.type), len(self._types)))
        return numbers


def _describe_constant(operation: Any) -> dict[str, Any]:
    if "value" not in operation.attributes:
        return {}
    value = operation.attributes["value"]
    if DenseResourceElementsAttr.isinstance(value):
        found = RESOURCE.match(str(value))
        return {"name": found[1]} if found else {}
    if not DenseElementsAttr.isinstance(value) or not READABLE.fullmatch(str(value.type.element_type)):
        return {}
    numbers = np.array(DenseElementsAttr(value)).astype(np.float64).reshape(-1)
    few = {"numbers": numbers.tolist()} if len(numbers) <= MOST_NUMBERS else {}
    return {**few, "range": [float(numbers.min()), float(numbers.max())]} if len(numbers) else few
