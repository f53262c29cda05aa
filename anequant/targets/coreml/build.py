"""One Core ML package of a quantized checkpoint, as a task that any process can do."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.checkpoints.layers import load_layer, load_table, open_quantized
from anequant.checkpoints.reader import Checkpoint
from anequant.recipe import LowerOptions
from anequant.targets.coreml.program.decoder import chunk_program
from anequant.targets.coreml.program.package import package_bytes, save_package
from anequant.targets.coreml.program.parts import embeddings_program, head_program
from anequant.targets.coreml.program.program import forget_names
from anequant.targets.coreml.toolkit import Program
from anequant.targets.shared.geometry import Geometry, constant_bytes, head_parts, table_bytes
from anequant.targets.shared.headroom import Headroom, fitted_layer, fitted_table
from anequant.targets.shared.rope_tables import lowered_rope_tables


@dataclass(frozen=True)
class PackageSize:
    """A package's weight file and graph on disk, and what one copy of each of its constants takes."""

    name: str
    weight_bytes: int
    constant_bytes: int
    graph_bytes: int


@dataclass(frozen=True)
class PackageTask:
    """A package called `name` of a checkpoint folder, to be written to a new folder in `home`.

    `part` is EMBEDDING, HEAD, or the layers of a chunk.
    """

    name: str
    part: str | range
    checkpoint: Path
    home: Path
    options: LowerOptions
    headroom: Headroom
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class BuiltPackage:
    path: Path
    size: PackageSize


def build_package(task: PackageTask) -> BuiltPackage:
    """Write the package; its bytes depend on the task alone."""
    checkpoint = open_quantized(task.checkpoint)
    forget_names()
    folder = task.home / uuid4().hex
    folder.mkdir()
    path = folder / f"{task.name}.mlpackage"
    with _collecting_once():
        constants = _write(checkpoint, task, path)
    weights, graph = package_bytes(path)
    return BuiltPackage(path, PackageSize(task.name, weights, constants, graph))


@contextmanager
def _collecting_once() -> Iterator[None]:
    """A program is many small objects that live until it is written: looking for garbage among them again
    and again takes a fifth of the time. What was there before is not looked at."""
    before = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        if before:
            gc.enable()


def _write(checkpoint: Checkpoint, task: PackageTask, path: Path) -> int:
    """The bytes of its constants."""
    if isinstance(task.part, range):
        program, constants = _chunk(checkpoint, task, task.part)
    elif task.part == EMBEDDING:
        program, constants = _embeddings(checkpoint, task)
    else:
        program, constants = _head(checkpoint, task)
    save_package(program, path, task.metadata)
    return constants


def _embeddings(checkpoint: Checkpoint, task: PackageTask) -> tuple[Program, int]:
    table = fitted_table(load_table(checkpoint, EMBEDDING), task.headroom)
    return embeddings_program(table, task.options.batch), constant_bytes(table)


def _head(checkpoint: Checkpoint, task: PackageTask) -> tuple[Program, int]:
    spec, table = checkpoint.spec, load_table(checkpoint, HEAD)
    program = head_program(spec, table, head_parts(spec), argmax=task.options.argmax)
    return program, constant_bytes(table)


def _chunk(checkpoint: Checkpoint, task: PackageTask, layers: range) -> tuple[Program, int]:
    spec, online, options = checkpoint.spec, checkpoint.online, task.options
    tables = lowered_rope_tables(spec, options.context)
    scale = task.headroom.residual_scale
    geometry = Geometry(spec, options.context, options.batch, *tables, scale, online)
    loaded = [fitted_layer(spec, load_layer(checkpoint, layer), task.headroom) for layer in layers]
    gain = checkpoint.read(f"{FINAL_NORM}.weight") if layers[-1] == spec.num_layers - 1 else None
    constants = sum(
        constant_bytes(weight, rounded=layer_prefix(layer.index) + linear in online.activations)
        for layer in loaded
        for linear, weight in layer.linears.items()
    )
    constants += table_bytes(spec, options.context, online)
    return chunk_program(geometry, loaded, gain), constants
