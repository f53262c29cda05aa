"""A saved program as a graph to look at, whatever its operations: nothing here can or need run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anequant.targets.coreml.signatures import (
    FunctionSpec,
    TensorSpec,
    read_constant_spec,
    read_functions,
    read_tensor_spec,
)
from anequant.targets.coreml.storage import Weights, damage, find_model_file, read_model

LUT, BLOCKS = "constexpr_lut_to_dense", "constexpr_blockwise_shift_scale"


@dataclass(frozen=True)
class Node:
    """An operation: its `outputs`, and for each input the names of the values it takes, None for an
    immediate one. Inputs are sorted by name, since a protobuf map has another order in every process."""

    kind: str
    outputs: tuple[TensorSpec, ...]
    inputs: Mapping[str, tuple[str | None, ...]]
    proto: Any

    @property
    def name(self) -> str:
        return self.outputs[0].name if self.outputs else ""

    @property
    def constant(self) -> bool:
        return self.kind == "const" or self.kind.startswith("constexpr_")


class Graph:
    """One function of a package: its nodes in order, and who makes and who takes each value."""

    def __init__(self, function: str, block: Any, spec: FunctionSpec, weights: Weights) -> None:
        self.function, self.spec = function, spec
        self._weights = weights
        self.outputs = tuple(block.outputs)
        self.nodes = [_node(operation) for operation in block.operations]
        self.producer = {output.name: node for node in self.nodes for output in node.outputs}
        self._consumers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for names in node.inputs.values():
                for name in names:
                    if name is not None:
                        self._consumers.setdefault(name, []).append(node)

    def consumers(self, node: Node) -> list[Node]:
        return [user for output in node.outputs for user in self._consumers.get(output.name, [])]

    def source(self, node: Node, name: str) -> Node | None:
        """Return what makes the (first) value of input `name`; None for a function input or an immediate."""
        names = node.inputs.get(name, ())
        return self.producer.get(names[0]) if names and names[0] is not None else None

    def shape(self, node: Node, name: str) -> tuple[int | None, ...]:
        """Return the shape of input `name`; () when unknown."""
        source = self.source(node, name)
        if source is not None:
            return source.outputs[0].shape
        names = node.inputs.get(name, ())
        if names and names[0] is None:
            return read_tensor_spec(name, node.proto.inputs[name].arguments[0].value.type).shape
        return next((spec.shape for spec in self.spec.inputs if names and spec.name == names[0]), ())

    def value(self, node: Node | None, name: str) -> Tensor | str | None:
        """Read a constant input from disk; None when it is computed or absent."""
        if node is None or name not in node.inputs:
            return None
        binding = node.proto.inputs[name].arguments[0]
        if binding.WhichOneof("binding") == "value":
            return self._weights.read(binding.value)
        source = self.producer.get(binding.name)
        return self.literal(source) if source is not None and source.kind == "const" else None

    def literal(self, node: Node) -> Tensor | str:
        """Read the value of a const."""
        return self.content(node.proto.attributes["val"])

    def content(self, value: Any) -> Tensor | str:
        """Read a MIL_pb2.Value from disk."""
        return self._weights.read(value)

    def of_kind(self, *kinds: str) -> Iterator[Node]:
        return (node for node in self.nodes if node.kind in kinds)

    def computing(self) -> Iterator[Node]:
        return (node for node in self.nodes if not node.constant)


def read_graphs(package: Path) -> list[Graph]:
    """Read every function of an .mlpackage. Raises InputError for a damaged one."""
    file = find_model_file(package)
    model, weights = read_model(file), Weights(file.parent)
    with damage(str(package)):
        return [
            Graph(name, block, spec, weights) for name, block, spec in read_functions(model, str(package))
        ]


def _node(operation: Any) -> Node:
    inputs = {
        name: tuple(
            binding.name if binding.WhichOneof("binding") == "name" else None
            for binding in argument.arguments
        )
        for name, argument in sorted(operation.inputs.items())
    }
    outputs = tuple(read_constant_spec(value.name, value.type) for value in operation.outputs)
    return Node(operation.type, outputs, inputs, operation)
