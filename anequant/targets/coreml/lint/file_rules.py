"""Rules about a package as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from anequant.targets.coreml.graph import Graph
from anequant.targets.coreml.program.package import WEIGHT_FILE
from anequant.targets.coreml.storage import Weights, find_model_file
from anequant.targets.shared.finding import ERROR, WARNING, Hit, rule

PHONE_BYTES, MAC_BYTES = 950_000_000, 2_000_000_000


@rule("P1", WARNING, "iOS loads about 1 GB a package, macOS 2 GB", "use more chunks")
def _size(graphs: Sequence[Graph], package: Path) -> Iterator[Hit]:
    file = package / WEIGHT_FILE
    size = file.stat().st_size if file.is_file() else 0
    if size > PHONE_BYTES:
        yield Hit(package.name, f"{size / 1e6:.0f} MB of weights", ERROR if size > MAC_BYTES else None)


@rule("P2", WARNING, "functions share weights by weight_id only", "give equal constants one id")
def _sharing(graphs: Sequence[Graph], package: Path) -> Iterator[Hit]:
    """Equal constants that lie at one place for one function and elsewhere for another."""
    if len(graphs) < 2:
        return
    weights = Weights(find_model_file(package).parent)
    blobs = {graph.function: dict(_blobs(graph)) for graph in graphs}
    shared = set.intersection(*(set(held) for held in blobs.values()))
    places: dict[str, dict[str, set[int]]] = {}
    names: dict[str, str] = {}
    for function, held in blobs.items():
        for offset in sorted(held.keys() - shared):
            name, value = held[offset]
            content = weights.read(value)
            if isinstance(content, Tensor):
                key = _digest(content)
                names.setdefault(key, name)
                places.setdefault(key, {}).setdefault(function, set()).add(offset)
    for key, found in places.items():
        copies = set(map(frozenset, found.values()))
        if len(copies) > 1:
            yield Hit(
                names[key],
                f"{len(frozenset().union(*copies))} copies of one constant in {len(found)} functions",
            )


def _blobs(graph: Graph) -> Iterator[tuple[int, tuple[str, Any]]]:
    """Yield the place in the weight file, operation and MIL_pb2.Value of every constant held there.

    Operands of a constexpr operation are bound by value; before iOS 18 they are attributes.
    """
    for node in graph.nodes:
        inputs, attributes = (sorted(part.items()) for part in (node.proto.inputs, node.proto.attributes))
        bindings = [binding for _, argument in inputs for binding in argument.arguments]
        values = [binding.value for binding in bindings if binding.WhichOneof("binding") == "value"]
        for value in (*(value for _, value in attributes), *values):
            if value.WhichOneof("value") == "blobFileValue":
                yield value.blobFileValue.offset, (node.name, value)


def _digest(content: Tensor) -> str:
    form = f"{content.dtype} {tuple(content.shape)} "
    return form + hashlib.sha256(content.numpy().tobytes()).hexdigest()


PACKAGE_RULES = (_size, _sharing)
