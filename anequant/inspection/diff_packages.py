"""What differs between two packages: functions, their tensors, operations, constants and metadata."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.errors import InputError
from anequant.inspection.diff_checkpoints import (
    Differences,
    Form,
    Pair,
    ValueDifference,
    diff_keys,
    diff_named,
    diff_values,
)
from anequant.inspection.inspect_package import count_operations
from anequant.targets.coreml.census import Constant, find_constant, list_constants, load_constant
from anequant.targets.coreml.graph import Graph, Node, read_graphs
from anequant.targets.coreml.signatures import TensorSpec
from anequant.targets.coreml.storage import Palettized, Value, damage, find_model_file, read_model

PLACES = ("inputs", "outputs", "states")


@dataclass(frozen=True)
class FunctionDifferences:
    """`tensors` are inputs, outputs and states that differ, in words for A and B, None where one is missing;
    `operations` counts of the kinds that differ; `changed` names the operations that only one has, or that
    have other inputs, settings or places in the order."""

    name: str
    tensors: Mapping[str, tuple[str | None, str | None]]
    operations: Mapping[str, tuple[int, int]]
    changed: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not (self.tensors or self.operations or self.changed)


@dataclass(frozen=True)
class PackageDifferences:
    """`functions` are those that differ; `constants` are of the weight file."""

    a: str
    b: str
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    functions: tuple[FunctionDifferences, ...]
    constants: Differences
    metadata: Mapping[str, tuple[Any, Any]]

    @property
    def same(self) -> bool:
        return self.constants.same and not (self.only_a or self.only_b or self.functions or self.metadata)


def diff_packages(a: Path, b: Path) -> PackageDifferences:
    """Compare two packages, one constant of each at a time. Raises what `read_graphs` and `load_constant`
    raise."""
    one, other = read_graphs(a), read_graphs(b)
    functions = {graph.function: graph for graph in one}
    others = {graph.function: graph for graph in other}
    with damage(f"{a} or {b}"):
        found = [diff_functions(graph, others[name]) for name, graph in functions.items() if name in others]
        constants = _constants(one, other)
    return PackageDifferences(
        a.name,
        b.name,
        tuple(name for name in functions if name not in others),
        tuple(name for name in others if name not in functions),
        tuple(function for function in found if not function.same),
        constants,
        diff_keys(_metadata(a), _metadata(b)),
    )


def _metadata(package: Path) -> dict[str, str]:
    model = read_model(find_model_file(package))
    return {
        "specification": str(model.specificationVersion),
        **model.description.metadata.userDefined,
    }


def diff_counts(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """How often either has what they have not equally often."""
    kinds = sorted(kind for kind in {**a, **b} if a.get(kind) != b.get(kind))
    return {kind: (a.get(kind, 0), b.get(kind, 0)) for kind in kinds}


def diff_functions(a: Graph, b: Graph) -> FunctionDifferences:
    """Compare two functions, from their programs alone."""
    return FunctionDifferences(
        a.function,
        diff_keys(_words(a), _words(b)),
        diff_counts(count_operations(a), count_operations(b)),
        tuple(_changed(_forms(a), _forms(b))),
    )


def _forms(graph: Graph) -> dict[str, Any]:
    """Return every operation by its name, in order; one without an output by what it takes."""
    forms: dict[str, Any] = {}
    for node in graph.nodes:
        taken = " ".join(str(name) for names in node.inputs.values() for name in names)
        forms[node.name or f"{node.kind} {taken}"] = _form(node)
    return forms


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    if list(a.items()) == list(b.items()):
        return
    unlike = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    yield from unlike or [name for name, other in zip(a, b, strict=True) if name != other]


def _words(graph: Graph) -> dict[str, str]:
    """Return the function's tensors: dtype and shape by place and name."""
    spec = graph.spec
    places: tuple[tuple[TensorSpec, ...], ...] = (spec.inputs, spec.outputs, spec.states)
    return {
        f"{place} {tensor.name}": f"{tensor.dtype} {list(tensor.shape)}"
        for place, tensors in zip(PLACES, places, strict=True)
        for tensor in tensors
    }


def _form(node: Node) -> Any:
    """Return an operation's MIL_pb2 message without where its constants lie in the weight file."""
    proto = copy.deepcopy(node.proto)
    values = [binding.value for argument in proto.inputs.values() for binding in argument.arguments]
    for value in (*values, *proto.attributes.values()):
        if value.WhichOneof("value") == "blobFileValue":
            value.blobFileValue.offset = 0
    return proto


def _constants(a: list[Graph], b: list[Graph]) -> Differences:
    ours, theirs = ({item.name: item for item in list_constants(graphs)} for graphs in (a, b))

    def compare(name: str) -> Pair:
        one, other = ours[name], theirs[name]
        form = None
        if _stored(one) != _stored(other):
            kinds = f"{one.kind} {one.dtype}", f"{other.kind} {other.dtype}"
            form = Form(name, kinds, (one.shape, other.shape))
        return form, _difference(name, _load(a, name), _load(b, name)) if one.shape == other.shape else None

    return diff_named(ours, theirs, compare)


def _stored(constant: Constant) -> tuple[Any, ...]:
    return constant.kind, constant.dtype, constant.shape, constant.tables, constant.entries


def _load(graphs: list[Graph], name: str) -> Value:
    found = find_constant(graphs, name)
    if found is None:
        raise InputError(f"constant '{name}' is gone")
    return load_constant(*found)


def _difference(name: str, a: Value, b: Value) -> ValueDifference | None:
    if isinstance(a, Palettized) and isinstance(b, Palettized) and a.codebook.shape == b.codebook.shape:
        ours, theirs = a.codes, b.codes
        return diff_values(name, _dense(a), _dense(b), lambda: int(torch.count_nonzero(ours != theirs)))
    return diff_values(name, _dense(a), _dense(b))


def _dense(value: Value) -> Tensor:
    if isinstance(value, str):
        raise InputError("a text in the weight file")
    return value.dense() if isinstance(value, Palettized) else value


def pair_packages(a: tuple[Path, ...], b: tuple[Path, ...]) -> Iterator[tuple[Path | None, Path | None]]:
    """Pair packages with the same name but for the width in it; two single ones whatever their names."""
    if len(a) == len(b) == 1:
        yield a[0], b[0]
        return
    ours, theirs = ({_key(path): path for path in paths} for paths in (a, b))
    for key in sorted(ours.keys() | theirs.keys()):
        yield ours.get(key), theirs.get(key)


def _key(path: Path) -> str:
    head, _, tail = path.stem.partition("_lut")
    return head + tail.lstrip("0123456789")
