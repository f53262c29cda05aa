"""What an .mlpackage is, from its program alone: the weight file is not read, its size is looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anequant.targets.coreml.census import LOOKED_UP, MULTIPLIED, Constant, list_constants
from anequant.targets.coreml.graph import Graph, read_graphs
from anequant.targets.coreml.signatures import TensorSpec
from anequant.targets.coreml.storage import damage, find_model_file, read_model


@dataclass(frozen=True)
class FunctionFacts:
    """Operations are counted by kind, without constants; `default` runs when none is named."""

    name: str
    default: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...]
    enumerated: Mapping[str, tuple[tuple[int, ...], ...]]
    operations: Mapping[str, int]


@dataclass(frozen=True)
class ConstantKind:
    """Constants in the weight file that are stored alike; `tables` of `entries` each, in all of them."""

    kind: str
    dtype: str
    bits: int
    entries: int
    tables: int
    count: int
    values: int
    bytes: int


@dataclass(frozen=True)
class PackageFacts:
    """`bits` of each weight, and `stored_bits` with scales and tables inside it; None where nothing is one.

    Weights are what operations multiply by; where they multiply by none, what they look rows up in.
    `float16_bytes`: all constants as float16.
    """

    name: str
    specification: int
    metadata: Mapping[str, str]
    functions: tuple[FunctionFacts, ...]
    constants: tuple[ConstantKind, ...]
    weights: int
    bits: float | None
    stored_bits: float | None
    files: Mapping[str, int]
    float16_bytes: int


def inspect_package(package: Path) -> PackageFacts:
    """Return what a package is. Raises InputError for a damaged one, UnsupportedError for one that is no
    mlProgram."""
    graphs = read_graphs(package)
    model = read_model(find_model_file(package))
    default = model.description.defaultFunctionName or (graphs[0].function if len(graphs) == 1 else "")
    with damage(str(package)):
        constants = list_constants(graphs)
    weights = [constant for constant in constants if constant.use == MULTIPLIED]
    weights = weights or [constant for constant in constants if constant.use == LOOKED_UP]
    values = sum(constant.values for constant in weights)
    codes = sum(constant.values * constant.bits for constant in weights)
    return PackageFacts(
        package.name,
        model.specificationVersion,
        dict(sorted(model.description.metadata.userDefined.items())),
        tuple(_function(graph, default) for graph in graphs),
        _kinds(constants),
        values,
        codes / values if values else None,
        8 * sum(constant.bytes for constant in weights) / values if values else None,
        list_package_files(package),
        2 * sum(constant.values for constant in constants),
    )


def list_package_files(package: Path) -> dict[str, int]:
    """Return the bytes of each file, by its path in the package."""
    found = sorted(path for path in package.rglob("*") if path.is_file())
    return {path.relative_to(package).as_posix(): path.stat().st_size for path in found}


def count_operations(graph: Graph) -> dict[str, int]:
    """Return how often each kind of operation computes, the most frequent first."""
    counts: dict[str, int] = {}
    for node in graph.computing():
        counts[node.kind] = counts.get(node.kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _function(graph: Graph, default: str) -> FunctionFacts:
    spec = graph.spec
    return FunctionFacts(
        graph.function,
        graph.function == default,
        spec.inputs,
        spec.outputs,
        spec.states,
        spec.enumerated,
        count_operations(graph),
    )


def _kinds(constants: Sequence[Constant]) -> tuple[ConstantKind, ...]:
    groups: dict[tuple[str, str, int, int], list[Constant]] = {}
    for constant in constants:
        key = (constant.kind, constant.dtype, constant.bits, constant.entries)
        groups.setdefault(key, []).append(constant)
    return tuple(
        ConstantKind(
            kind,
            dtype,
            bits,
            entries,
            sum(constant.tables for constant in group),
            len(group),
            sum(constant.values for constant in group),
            sum(constant.bytes for constant in group),
        )
        for (kind, dtype, bits, entries), group in groups.items()
    )
