"""Packages as files: the manifest lists what is there, and every constant lies inside its file.

Nothing is run. A package is a folder with Manifest.json and Data; the manifest names items below Data by
path, and one of them as the root model (coremltools, modelpackage/src/ModelPackage.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.errors import InputError, VerificationError, quote
from anequant.strict import parse_json, read_plain
from anequant.targets.coreml.graph import LUT, Graph, Node, read_graphs
from anequant.targets.coreml.meta import INFER, META, PREFILL, read_meta
from anequant.targets.coreml.meta_check import check_package
from anequant.targets.coreml.storage import LARGEST_MANIFEST, damage, find_model_file, resolve_below
from anequant.verification.files import PACKAGES, failing, verify_files

DATA, MANIFEST_FILE = "Data", "Manifest.json"

Constant = tuple[str, str, Any]
"""An operation's name, the input's, and the MIL_pb2.Value that it is bound to."""


def verify_package_folder(folder: Path) -> dict[str, Any]:
    """Check hashes, then the packages; returns the folder's anequant.json. Raises as `verify_files`."""
    recorded = verify_files(folder, PACKAGES)
    with failing(folder):
        verify_package_files(folder)
    return recorded


def verify_package_files(folder: Path) -> None:
    """Check every package that meta.yaml names, and that there are no others.

    Raises VerificationError or InputError, naming the package, its file and the constant.
    """
    packages = read_meta(folder)
    due = {f"{name}.mlpackage" for name in packages.package_names}
    present = {path.name for path in folder.glob("*.mlpackage")}
    for name in sorted(due - present):
        keys = packages.keys_of(name.removesuffix(".mlpackage"))
        problem = f"is missing; {keys} of {META} name it so"
        raise VerificationError(f"package {quote(name)} {problem}", where=str(folder))
    for name in sorted(present - due):
        raise VerificationError(f"package {quote(name)} is none of {META}", where=str(folder))
    for name in packages.package_names:
        path = folder / f"{name}.mlpackage"
        verify_items(path)
        with damage(str(path)):
            graphs = read_graphs(path)
            check_package(packages, name, {graph.function: graph.spec for graph in graphs}, folder)
            for graph, constants, tables in _read_once(graphs):
                where = f"{path}, {graph.function}"
                _verify_finite(graph, constants, where)
                _verify_codes(graph, tables, where)
                if name in packages.chunk_names and graph.function not in (INFER, PREFILL):
                    problem = f"function {quote(graph.function)} is none of a decoder's"
                    raise VerificationError(problem, where=str(path))


def verify_items(package: Path) -> None:
    """Raise InputError or VerificationError unless Manifest.json lists the files below Data: each once, and
    by a path that stays there."""
    where = str(package / MANIFEST_FILE)
    model = find_model_file(package)
    try:
        items = list(
            parse_json(read_plain(package / MANIFEST_FILE, LARGEST_MANIFEST))["itemInfoEntries"].values()
        )
        paths = [item["path"] for item in items]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError("the manifest lists no items", where=where) from error
    if not all(isinstance(path, str) for path in paths) or len(set(paths)) != len(paths):
        raise VerificationError("the manifest lists items without a path of their own", where=where)
    listed = {resolve_below(package / DATA, path) for path in paths}
    for path in sorted(listed):
        if not path.exists():
            name = path.relative_to(package).as_posix()
            raise VerificationError(f"{quote(name)}, which the manifest lists, is missing", where=where)
    for path in sorted(package.rglob("*")):
        known = path == package / MANIFEST_FILE or not listed.isdisjoint((path, *path.parents))
        if not path.is_dir() and not known:
            name = path.relative_to(package).as_posix()
            raise VerificationError(f"{quote(name)} is in no item of the manifest", where=where)
    if model not in listed:
        raise VerificationError("the root model is none of the manifest's items", where=where)


def _read_once(graphs: Sequence[Graph]) -> Iterator[tuple[Graph, list[Constant], list[Node]]]:
    """Yield each graph with its constants bound by value and its lookup tables, but for those that it shares
    with a graph before it."""
    seen: set[bytes] = set()

    def is_new(message: Any) -> bool:
        before = len(seen)
        seen.add(message.SerializeToString(deterministic=True))
        return len(seen) > before

    for graph in graphs:
        constants = [constant for constant in _bound_values(graph) if is_new(constant[2])]
        yield graph, constants, [node for node in graph.of_kind(LUT) if is_new(node.proto)]


def _verify_finite(graph: Graph, constants: Sequence[Constant], where: str) -> None:
    """Check that every constant can be read and is finite."""
    for name, key, value in constants:
        content = graph.content(value)
        if isinstance(content, Tensor) and not bool(torch.isfinite(content).all()):
            count = int((~torch.isfinite(content)).sum())
            raise VerificationError(f"'{name}' ({key}) holds {count} values that are not finite", where=where)


def _verify_codes(graph: Graph, tables: Sequence[Node], where: str) -> None:
    """Check that every code is inside its codebook."""
    for node in tables:
        codes, table = graph.value(node, "indices"), graph.value(node, "lut")
        if not isinstance(codes, Tensor) or not isinstance(table, Tensor):
            raise VerificationError(f"'{node.name}' has no codes or no codebook", where=where)
        largest, entries = int(codes.max()) if codes.numel() else 0, table.shape[-2]
        if largest >= entries:
            raise VerificationError(
                f"'{node.name}' holds the code {largest}, its codebook has {entries} entries", where=where
            )


def _bound_values(graph: Graph) -> Iterator[Constant]:
    """Yield every constant that is bound by value."""
    for node in graph.nodes:
        if node.kind == "const":
            yield node.name, "val", node.proto.attributes["val"]
        for key, argument in sorted(node.proto.inputs.items()):
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "value":
                    yield node.name, key, binding.value
