"""Rules about a package as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from anequant.coreml.graph import Graph, blob_offset
from anequant.coreml.lint import ERROR, WARNING, Chip, Hit, Rule
from anequant.coreml.package import WEIGHT_FILE

PHONE_BYTES, MAC_BYTES = 950_000_000, 2_000_000_000


def _size(graphs: Sequence[Graph], package: Path) -> Iterator[Hit]:
    file = package / WEIGHT_FILE
    size = file.stat().st_size if file.is_file() else 0
    if size > PHONE_BYTES:
        yield Hit(package.name, f"{size / 1e6:.0f} MB of weights", ERROR if size > MAC_BYTES else None)


def _sharing(graphs: Sequence[Graph], package: Path) -> Iterator[Hit]:
    places: dict[str, set[int]] = {}
    for graph in graphs:
        for node in graph.of_kind("const"):
            offset = blob_offset(node)
            if offset is not None:
                places.setdefault(node.name, set()).add(offset)
    for name, offsets in places.items():
        if len(offsets) > 1:
            yield Hit(name, f"{len(offsets)} copies of one constant")


def _no_check(graph: Graph, chip: Chip) -> Iterator[Hit]:
    return iter(())


PACKAGE_RULES: tuple[tuple[Rule, Callable[[Sequence[Graph], Path], Iterator[Hit]]], ...] = (
    (
        Rule(
            "P1",
            WARNING,
            "iOS loads about 1 GB a package, macOS 2 GB",
            "use more chunks",
            _no_check,
        ),
        _size,
    ),
    (
        Rule(
            "P2",
            WARNING,
            "functions share weights by weight_id only",
            "give equal constants one id",
            _no_check,
        ),
        _sharing,
    ),
)
