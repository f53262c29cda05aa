"""The constants of packages, read from disk, against the checkpoint: weights, rounding steps, rotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, HEAD, layer_prefix
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import VerificationError
from anequant.jobs.control import Progress
from anequant.targets.coreml.graph import Graph, Node, read_graphs
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.meta import read_meta
from anequant.targets.coreml.program.linears import name_head_part, name_weight
from anequant.targets.shared.packed_codes import CompressedWeight, check_weight, take_rows
from anequant.targets.shared.rotation_names import name_factor
from anequant.targets.shared.rotation_weights import make_online_weights

Names = dict[str, tuple[str, slice]]


def verify_constants(folder: Path, checkpoint: Checkpoint, progress: Progress) -> int:
    """Return how many compressed weights equal the checkpoint's, bit for bit.

    Raises VerificationError for one that does not or is missing or unknown, for functions of a package that
    do not share it, and where inputs are rounded or rotated otherwise than the checkpoint says.
    """
    packages = read_meta(folder)
    quantized = _name_quantized(checkpoint, packages.head_parts)
    count = 0
    for number, package in enumerate(packages.package_names):
        progress(f"weights of {package}", 0.5 * number / len(packages.package_names))
        path = folder / f"{package}.mlpackage"
        count += _verify_weights(Package.open(path), quantized, checkpoint)
        for graph in read_graphs(path):
            _verify_rounding(graph, quantized, checkpoint, str(path))
            if package in packages.chunk_names:
                _verify_rotations(graph, quantized, checkpoint, str(path))
    if count != len(quantized):
        raise VerificationError(
            f"{count} compressed weights where {len(quantized)} are due", where=str(folder)
        )
    return count


def _verify_weights(package: Package, quantized: Names, checkpoint: Checkpoint) -> int:
    places: dict[str, list[int | None]] = {}
    first: dict[str, CompressedWeight] = {}
    loaded, where = "", str(package.path)
    for _, value, weight in package.read_compressed_weights():
        if value not in quantized:
            raise VerificationError(f"compressed weight '{value}' is unknown", where=where)
        name, part = quantized[value]
        if value not in places:
            if name != loaded:
                whole, loaded = load(name, checkpoint.read, checkpoint.tensors), name
            rounded = name in checkpoint.online.activations
            check_weight(value, weight, take_rows(whole, part), where, rounded=rounded)
            first[value] = weight
        elif not weight.has_tables_of(first[value]):
            raise VerificationError(f"'{value}' has not the same codebook or scales twice", where=where)
        places.setdefault(value, []).append(weight.place)
    for value, found in places.items():
        if len(found) != len(package.functions) or len(set(found)) != 1:
            raise VerificationError(
                f"the functions of '{package.path.stem}' do not share one copy of '{value}'", where=where
            )
    return len(places)


def _name_quantized(checkpoint: Checkpoint, head_parts: int) -> Names:
    """Tell what each compressed value of the packages holds: a quantized tensor's name, and which rows."""
    everything = slice(None)
    names = {}
    for layer in range(checkpoint.spec.num_layers):
        for linear in checkpoint.spec.architecture.linears:
            name = layer_prefix(layer) + linear.name
            names[name_weight(name)] = (name, everything)
    if f"{EMBEDDING}.codebook" in checkpoint.tensors:
        names[name_weight(EMBEDDING)] = (EMBEDDING, everything)
    if f"{HEAD}.codebook" in checkpoint.tensors:
        rows = checkpoint.spec.vocab_size // head_parts
        for part in range(head_parts):
            names[name_weight(name_head_part(part + 1))] = (HEAD, slice(part * rows, (part + 1) * rows))
    return names


def _verify_rounding(graph: Graph, quantized: Names, checkpoint: Checkpoint, where: str) -> None:
    """Check that each linear's input passes through quantize and dequantize, with its scale, or neither."""
    for conv, name in _linears(graph, quantized):
        format_ = checkpoint.online.activations.get(name)
        back = graph.source(conv, "x")
        codes = graph.source(back, "input") if back is not None and back.kind == "dequantize" else None
        scales = [graph.value(node, "scale") for node in (codes, back)] if codes is not None else []
        found = [float(scale) if isinstance(scale, Tensor) and not scale.ndim else 0.0 for scale in scales]
        expected = [] if format_ is None or format_.scale is None else [format_.scale] * 2
        plain = codes is None or (
            codes.kind == "quantize"
            and codes.outputs[0].dtype == "int8"
            and not any("zero_point" in node.inputs for node in (codes, back) if node is not None)
        )
        if found != expected or not plain:
            raise VerificationError(
                f"the input of '{name}' is rounded by {found or 'nothing'}, not by {expected or 'nothing'}",
                where=f"{where}, {graph.function}",
            )


def _verify_rotations(graph: Graph, quantized: Names, checkpoint: Checkpoint, where: str) -> None:
    """Check that a layer has one convolution with each factor of online rotations, and no other float one."""
    spec = checkpoint.spec
    expected = {
        name_factor(name, number): weight
        for name, weights in make_online_weights(spec, checkpoint.online).items()
        for number, weight in enumerate(weights)
    }
    layers = len(list(_linears(graph, quantized))) // len(spec.architecture.linears)
    uses: Counter[str] = Counter()
    for conv in graph.of_kind("conv"):
        source = graph.source(conv, "weight")
        if source is not None and source.kind == "const":
            uses[source.name] += 1
    if uses != dict.fromkeys(expected, layers):
        raise VerificationError(
            f"the online rotations have the factors {dict(uses)}, due are {layers} of {list(expected)}",
            where=f"{where}, {graph.function}",
        )
    for name, weight in expected.items():
        stored = graph.literal(graph.producer[name])
        if not isinstance(stored, Tensor) or not torch.equal(stored, weight):
            raise VerificationError(f"'{name}' is not its rotation's", where=f"{where}, {graph.function}")


def _linears(graph: Graph, quantized: Names) -> Iterator[tuple[Node, str]]:
    """Yield the convolutions whose weight is a quantized tensor, and its name."""
    for conv in graph.of_kind("conv"):
        source = graph.source(conv, "weight")
        if source is not None and source.name in quantized:
            yield conv, quantized[source.name][0]
