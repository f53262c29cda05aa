"""A quantized checkpoint becomes a set of Core ML packages, one chunk of layers in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.calibration.forward import lowered_rope_tables
from anequant.calibration.ranges import LayerRange, layer_ranges
from anequant.checkpoints.foreign import whole_codebook
from anequant.checkpoints.layers import load_layer, load_table, open_quantized, projection_bits
from anequant.checkpoints.layout import projection_names
from anequant.checkpoints.manifest import write_manifest
from anequant.checkpoints.output import file_hashes
from anequant.checkpoints.quantized import require_parts
from anequant.checkpoints.reader import Checkpoint, read_object
from anequant.checkpoints.source import TOKENIZER_FILES
from anequant.checkpoints.writer import write_json
from anequant.coreml.decoder import Geometry, chunk_program
from anequant.coreml.headroom import Headroom, fitted_layer, fitted_table, plan_headroom
from anequant.coreml.meta import PackageSet, write_meta
from anequant.coreml.package import package_bytes, save_package
from anequant.coreml.parts import embeddings_program, head_program
from anequant.coreml.program import forget_names
from anequant.pipeline.chunks import chunk_ranges, constant_bytes, least_chunks, table_bytes
from anequant.pipeline.jobs import EMBEDDING_PACKAGE, HEAD_PACKAGE, RANGES
from anequant.pipeline.journal import Journal
from anequant.pipeline.lowerable import check_lowering, head_parts
from anequant.pipeline.plan import base_of, lowering_plan
from anequant.pipeline.probe import RANGE_TOKENS, probe_tokens
from anequant.pipeline.resume import fingerprint, resumable
from anequant.pipeline.schedule import units_of
from anequant.progress import CONTROL, Control, Progress, silent
from anequant.recipe import LowerOptions


@dataclass(frozen=True)
class PackageSize:
    """A package's weight file and graph on disk, and what one copy of each of its constants takes."""

    name: str
    weight_bytes: int
    constant_bytes: int
    graph_bytes: int


@dataclass(frozen=True)
class LowerResult:
    packages: tuple[PackageSize, ...]
    headroom: Headroom

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def lower(
    checkpoint_folder: Path,
    output: Path,
    options: LowerOptions,
    *,
    force: bool = False,
    progress: Progress = silent,
    control: Control = CONTROL,
) -> LowerResult:
    """Write the packages of a quantized checkpoint to the new folder `output`.

    Raises UsageError when `output` exists (without `force`), a size is impossible or another job was
    interrupted, InputError for a checkpoint that is not quantized or breaks the contract, UnsupportedError
    for what cannot be lowered. See `resumable` for what an interrupt and a full disk leave.
    """
    checkpoint, name = open_quantized(checkpoint_folder), checkpoint_folder.resolve().name
    for projection in projection_names(checkpoint.spec):
        require_parts(projection, checkpoint.tensors)
    base = base_of(checkpoint.spec, control.max_memory)
    plan = lowering_plan(checkpoint, options, base, control.max_memory)
    with resumable(
        output,
        fingerprint("lower", checkpoint, name, lowering=options),
        needed=plan.disk.total,
        force=force,
        source=checkpoint_folder,
        control=control,
        units=units_of(plan.jobs, checkpoint.spec),
    ) as journal:
        return lower_into(journal.output, checkpoint_folder, name, options, progress, journal)


def lower_into(
    folder: Path,
    checkpoint_folder: Path,
    name: str,
    options: LowerOptions,
    progress: Progress,
    journal: Journal,
) -> LowerResult:
    """As `lower`, into a folder of a job's output; `name` is the model's name in meta.yaml."""
    checkpoint = open_quantized(checkpoint_folder)
    spec = checkpoint.spec
    check_lowering(spec, options, checkpoint.online)
    progress(RANGES, journal.share(RANGES)[0])
    headroom = plan_headroom(_ranges(checkpoint, journal))
    tables = lowered_rope_tables(spec, options.context)
    geometry = Geometry(
        spec, options.context, options.batch, *tables, headroom.residual_scale, checkpoint.online
    )
    chunks = options.chunks or least_chunks(checkpoint, options.context, options.max_chunk_mb)
    packages = PackageSet(
        model=name,
        architecture=spec.architecture.model_type,
        prefix=options.prefix or spec.architecture.package_prefix,
        context=options.context,
        batch=options.batch,
        chunks=chunks,
        head_parts=head_parts(spec),
        lut_embeddings=_table_bits(checkpoint, EMBEDDING),
        lut_ffn=min(projection_bits(checkpoint).values()),
        lut_head=_table_bits(checkpoint, HEAD),
        vocab_size=spec.vocab_size,
        argmax=options.argmax,
    )
    sizes: list[PackageSize] = []

    def save(called: str, package: str, make: Callable[[], tuple[Any, int]], **metadata: object) -> None:
        """Write the package of what `make` yields, a program and the bytes of its constants, as a unit."""
        progress(called, journal.share(called)[0])

        def run() -> dict[str, Any]:
            path = folder / f"{package}.mlpackage"
            shutil.rmtree(path, ignore_errors=True)
            forget_names()
            program, constants = make()
            save_package(program, path, _metadata(packages, metadata))
            weights, graph = package_bytes(path)
            return asdict(PackageSize(package, weights, constants, graph))

        def tell(size: dict[str, Any]) -> list[str]:
            return [f"{(size['weight_bytes'] + size['graph_bytes']) / 1e6:.1f} MB"]

        sizes.append(PackageSize(**journal.unit(package, run, tell, called)))

    def embeddings() -> tuple[Any, int]:
        table = fitted_table(load_table(checkpoint, EMBEDDING), headroom)
        return embeddings_program(table, options.batch), constant_bytes(table)

    def head() -> tuple[Any, int]:
        table = load_table(checkpoint, HEAD)
        return head_program(spec, table, packages.head_parts, argmax=options.argmax), constant_bytes(table)

    def chunk(layers: range) -> tuple[Any, int]:
        loaded = [fitted_layer(spec, load_layer(checkpoint, layer), headroom) for layer in layers]
        gain = checkpoint.read(f"{FINAL_NORM}.weight") if layers[-1] == spec.num_layers - 1 else None
        constants = sum(
            constant_bytes(
                weight, rounded=layer_prefix(layer.index) + linear in checkpoint.online.activations
            )
            for layer in loaded
            for linear, weight in layer.linears.items()
        )
        constants += table_bytes(spec, options.context, checkpoint.online)
        return chunk_program(geometry, loaded, gain), constants

    save(EMBEDDING_PACKAGE, packages.embeddings, embeddings, lut_bits=packages.lut_embeddings)
    for number, layers in enumerate(chunk_ranges(spec.num_layers, chunks)):
        save(
            f"chunk {number + 1} of {chunks}",
            packages.chunk_names[number],
            partial(chunk, layers),
            lut_bits=packages.lut_ffn,
            chunk_no=number + 1,
            functions="infer,prefill",
        )
    save(
        HEAD_PACKAGE,
        packages.head,
        head,
        lut_bits=packages.lut_head,
        argmax_in_model=options.argmax or None,
        vocab_size=spec.vocab_size if options.argmax else None,
        lm_head_chunk_sizes=packages.head_sizes if options.argmax else None,
    )

    def write_side_files() -> None:
        write_meta(folder, packages)
        _write_side_files(folder, checkpoint)
        contents = {
            "checkpoint": checkpoint_hashes(checkpoint),
            "options": {**asdict(options), "chunks": chunks},
            "packages": [asdict(size) for size in sizes],
            "headroom": asdict(headroom),
        }
        write_manifest(folder, "packages", contents)

    journal.unit("package files", write_side_files)
    return LowerResult(tuple(sizes), headroom)


def _ranges(checkpoint: Checkpoint, journal: Journal) -> list[LayerRange]:
    """`layer_ranges` of a few tokens, as a unit."""

    def run() -> list[dict[str, Any]]:
        tokens = probe_tokens(checkpoint, RANGE_TOKENS)[None]
        return [asdict(layer) for layer in layer_ranges(checkpoint, tokens)]

    return [LayerRange(**layer) for layer in journal.unit(RANGES, run)]


def checkpoint_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """What identifies the checkpoint that packages were made from: its config and weights."""
    return file_hashes(checkpoint.folder, checkpoint.files)


def _table_bits(checkpoint: Checkpoint, name: str) -> int | None:
    """The width of the embedding or the head, None for float16."""
    if f"{name}.codebook" not in checkpoint.tensors:
        return None
    entries = whole_codebook(name, checkpoint.read(f"{name}.codebook")).numel()
    return (entries - 1).bit_length()


def _metadata(packages: PackageSet, more: dict[str, object]) -> dict[str, str]:
    values = {
        "info": "Converted by anequant",
        "context_length": packages.context,
        "batch_size": packages.batch,
        "num_chunks": packages.chunks,
        **more,
    }
    return {f"com.anemll.{key}": str(value) for key, value in values.items() if value is not None}


def _write_side_files(folder: Path, checkpoint: Checkpoint) -> None:
    tokenizer_class = None
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    if (checkpoint.folder / "tokenizer_config.json").is_file():
        tokenizer_class = read_object(checkpoint.folder / "tokenizer_config.json").get("tokenizer_class")
    write_json(
        folder / "config.json",
        {"tokenizer_class": tokenizer_class, "model_type": checkpoint.spec.architecture.model_type},
    )
