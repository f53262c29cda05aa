"""One Core ML package of a quantized checkpoint, as a task that any process can do."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from anequant.architectures.spec import EMBEDDING
from anequant.checkpoints.layers import load_table, open_quantized
from anequant.checkpoints.reader import Checkpoint
from anequant.targets.coreml.program.decoder import chunk_program
from anequant.targets.coreml.program.package import package_bytes, save_package
from anequant.targets.coreml.program.parts import embeddings_program, head_program
from anequant.targets.coreml.program.program import forget_names
from anequant.targets.coreml.toolkit import Program
from anequant.targets.shared.geometry import count_constant_bytes, count_head_parts
from anequant.targets.shared.headroom import fit_table
from anequant.targets.shared.package_task import BuiltPackage, PackageSize, PackageTask, load_chunk


def build_package(task: PackageTask) -> BuiltPackage:
    """Write a package; its bytes depend on the task alone."""
    checkpoint = open_quantized(task.checkpoint)
    forget_names()
    folder = task.home / uuid4().hex
    folder.mkdir()
    path = folder / f"{task.name}.mlpackage"
    with _collect_once():
        constants = _write_package(checkpoint, task, path)
    weights, graph = package_bytes(path)
    return BuiltPackage(path, PackageSize(task.name, weights, constants, graph))


@contextmanager
def _collect_once() -> Iterator[None]:
    """Look for garbage once, at the end: a program is many small objects that live until it is written, and
    looking among them again and again takes a fifth of the time. What was there before is not looked at."""
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


def _write_package(checkpoint: Checkpoint, task: PackageTask, path: Path) -> int:
    """Write a package and drop its program; return the bytes of its constants."""
    program, constants = _build_program(checkpoint, task)
    save_package(program, path, task.metadata)
    return constants


def _build_program(checkpoint: Checkpoint, task: PackageTask) -> tuple[Program, int]:
    """Build the program of a package; return it and the bytes of its constants."""
    spec = checkpoint.spec
    if isinstance(task.part, range):
        chunk = load_chunk(checkpoint, task.part, task.options, task.headroom)
        return chunk_program(chunk), chunk.constant_bytes
    table = load_table(checkpoint, task.part)
    if task.part == EMBEDDING:
        table = fit_table(table, task.headroom)
        return embeddings_program(table, task.options.batch), count_constant_bytes(table)
    program = head_program(spec, table, count_head_parts(spec), argmax=task.options.argmax)
    return program, count_constant_bytes(table)
