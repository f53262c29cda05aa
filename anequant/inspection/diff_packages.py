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
from anequant.inspection.diff import (
    Differences,
    Form,
    ValueDifference,
    difference,
    keys_that_differ,
    worst_first,
)
from anequant.inspection.inspect_package import operations_by_kind
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
    """Reads one constant of each at a time. Raises what `read_graphs` and `load_constant` raise."""
    one, other = read_graphs(a), read_graphs(b)
    functions = {graph.function: graph for graph in one}
    others = {graph.function: graph for graph in other}
    with damage(f"{a} or {b}"):
        found = [
            function_differences(graph, others[name]) for name, graph in functions.items() if name in others
        ]
        constants = _constants(one, other)
    return PackageDifferences(
        a.name,
        b.name,
        tuple(name for name in functions if name not in others),
        tuple(name for name in others if name not in functions),
        tuple(function for function in found if not function.same),
        constants,
        keys_that_differ(_metadata(a), _metadata(b)),
    )


def _metadata(package: Path) -> dict[str, str]:
    model = read_model(find_model_file(package))
    return {
        "specification": str(model.specificationVersion),
        **model.description.metadata.userDefined,
    }


def function_differences(a: Graph, b: Graph) -> FunctionDifferences:
    """From the two programs alone."""
    counts = [operations_by_kind(graph) for graph in (a, b)]
    kinds = sorted(kind for kind in {**counts[0], **counts[1]} if counts[0].get(kind) != counts[1].get(kind))
    return FunctionDifferences(
        a.function,
        keys_that_differ(_words(a), _words(b)),
        {kind: (counts[0].get(kind, 0), counts[1].get(kind, 0)) for kind in kinds},
        tuple(_changed(_forms(a), _forms(b))),
    )


def _forms(graph: Graph) -> dict[str, Any]:
    """Every operation by its name, in order; one without an output by what it takes."""
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
    """The function's tensors: dtype and shape by place and name."""
    spec = graph.spec
    places: tuple[tuple[TensorSpec, ...], ...] = (spec.inputs, spec.outputs, spec.states)
    return {
        f"{place} {tensor.name}": f"{tensor.dtype} {list(tensor.shape)}"
        for place, tensors in zip(PLACES, places, strict=True)
        for tensor in tensors
    }


def _form(node: Node) -> Any:
    """An operation's MIL_pb2 message without where its constants lie in the weight file."""
    proto = copy.deepcopy(node.proto)
    values = [binding.value for argument in proto.inputs.values() for binding in argument.arguments]
    for value in (*values, *proto.attributes.values()):
        if value.WhichOneof("value") == "blobFileValue":
            value.blobFileValue.offset = 0
    return proto


def _constants(a: list[Graph], b: list[Graph]) -> Differences:
    one, other = ({item.name: item for item in list_constants(graphs)} for graphs in (a, b))
    both = [name for name in one if name in other]
    forms, values = [], []
    for name in both:
        pair = one[name], other[name]
        if _stored(pair[0]) != _stored(pair[1]):
            words = tuple(f"{item.kind} {item.dtype}" for item in pair)
            forms.append(Form(name, (words[0], words[1]), (pair[0].shape, pair[1].shape)))
        if pair[0].shape == pair[1].shape:
            found = _difference(name, _load(a, name), _load(b, name))
            values += [] if found is None else [found]
    unlike = {form.name for form in forms} | {value.name for value in values}
    return Differences(
        tuple(name for name in one if name not in other),
        tuple(name for name in other if name not in one),
        tuple(forms),
        worst_first(values),
        len(both) - len(unlike),
    )


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
        return difference(name, _dense(a), _dense(b), lambda: int(torch.count_nonzero(ours != theirs)))
    return difference(name, _dense(a), _dense(b))


def _dense(value: Value) -> Tensor:
    if isinstance(value, str):
        raise InputError("a text in the weight file")
    return value.dense() if isinstance(value, Palettized) else value


def pairs(a: tuple[Path, ...], b: tuple[Path, ...]) -> Iterator[tuple[Path | None, Path | None]]:
    """Packages of the same name but for the width in it; two single ones whatever their names."""
    if len(a) == len(b) == 1:
        yield a[0], b[0]
        return
    ours, theirs = ({_key(path): path for path in paths} for paths in (a, b))
    for key in sorted(ours.keys() | theirs.keys()):
        yield ours.get(key), theirs.get(key)


def _key(path: Path) -> str:
    head, _, tail = path.stem.partition("_lut")
    return head + tail.lstrip("0123456789")
