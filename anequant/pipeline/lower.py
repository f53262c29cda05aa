"""A quantized checkpoint becomes a set of Core ML packages, each a task with a chunk of layers in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anequant.architectures.spec import EMBEDDING, HEAD
from anequant.calibration.ranges import LayerRange, layer_ranges
from anequant.checkpoints.foreign import whole_codebook
from anequant.checkpoints.layers import open_quantized, projection_bits
from anequant.checkpoints.layout import projection_names
from anequant.checkpoints.manifest import checkpoint_hashes, write_manifest
from anequant.checkpoints.quantized import require_parts
from anequant.checkpoints.reader import Checkpoint, read_object
from anequant.checkpoints.side_files import check_side_files
from anequant.checkpoints.source import TOKENIZER_FILES
from anequant.checkpoints.writer import write_json
from anequant.jobs.control import CONTROL, Control, Progress, silent
from anequant.jobs.journal import Journal
from anequant.jobs.resume import resumable
from anequant.jobs.task_files import passing_folder
from anequant.pipeline.fingerprint import fingerprint
from anequant.planning.plan import base_of, lowering_plan
from anequant.planning.schedule import units_of
from anequant.planning.steps import EMBEDDING_PACKAGE, HEAD_PACKAGE, RANGES
from anequant.recipe import LowerOptions
from anequant.reference.probe import RANGE_TOKENS, probe_tokens
from anequant.targets.coreml.build import build_package
from anequant.targets.coreml.lowerable import check_lowering
from anequant.targets.coreml.meta import PackageSet, write_meta
from anequant.targets.shared.geometry import count_head_parts, find_least_chunks, split_layers
from anequant.targets.shared.headroom import Headroom, plan_headroom
from anequant.targets.shared.package_task import PackageSize, PackageTask


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
    check_side_files(checkpoint_folder)
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
    check_lowering(checkpoint.spec, options, checkpoint.online)
    with ThreadPoolExecutor(1) as beside:
        hashes = beside.submit(checkpoint_hashes, checkpoint)
        return _lower(folder, checkpoint, name, options, progress, journal, hashes)


def _lower(
    folder: Path,
    checkpoint: Checkpoint,
    name: str,
    options: LowerOptions,
    progress: Progress,
    journal: Journal,
    hashes: Future[dict[str, str]],
) -> LowerResult:
    spec = checkpoint.spec
    progress(RANGES, journal.share(RANGES)[0])
    headroom = plan_headroom(_ranges(checkpoint, journal))
    chunks = options.chunks or find_least_chunks(checkpoint, options.context, options.max_chunk_mb)
    packages = PackageSet(
        model=name,
        architecture=spec.architecture.model_type,
        prefix=options.prefix or spec.architecture.package_prefix,
        context=options.context,
        batch=options.batch,
        chunks=chunks,
        head_parts=count_head_parts(spec),
        lut_embeddings=_table_bits(checkpoint, EMBEDDING),
        lut_ffn=min(projection_bits(checkpoint).values()),
        lut_head=_table_bits(checkpoint, HEAD),
        vocab_size=spec.vocab_size,
        argmax=options.argmax,
    )
    with passing_folder(journal.tasks) as home:
        tasks = [
            PackageTask(package, part, checkpoint.folder, home, options, headroom, metadata)
            for package, part, metadata in _parts(packages, spec.num_layers)
        ]
        sizes = _build(folder, tasks, progress, journal)

    def write_side_files() -> None:
        write_meta(folder, packages)
        _write_side_files(folder, checkpoint)
        contents = {
            "checkpoint": hashes.result(),
            "options": {**asdict(options), "chunks": chunks},
            "packages": [asdict(size) for size in sizes],
            "headroom": asdict(headroom),
        }
        write_manifest(folder, "packages", contents)

    journal.unit("package files", write_side_files)
    return LowerResult(tuple(sizes), headroom)


def _parts(packages: PackageSet, layers: int) -> Iterator[tuple[str, str | range, dict[str, str]]]:
    """Name, part and metadata of every package, in running order."""
    yield packages.embeddings, EMBEDDING, _metadata(packages, lut_bits=packages.lut_embeddings)
    for number, part in enumerate(split_layers(layers, packages.chunks)):
        metadata = _metadata(
            packages, lut_bits=packages.lut_ffn, chunk_no=number + 1, functions="infer,prefill"
        )
        yield packages.chunk_names[number], part, metadata
    argmax = packages.argmax
    metadata = _metadata(
        packages,
        lut_bits=packages.lut_head,
        argmax_in_model=argmax or None,
        vocab_size=packages.vocab_size if argmax else None,
        lm_head_chunk_sizes=packages.head_sizes if argmax else None,
    )
    yield packages.head, HEAD, metadata


def _build(
    folder: Path, tasks: Sequence[PackageTask], progress: Progress, journal: Journal
) -> list[PackageSize]:
    """The packages of all tasks in `folder`, a unit each; what an interrupted run made is there."""
    missing = [task for task in tasks if not journal.done(task.name)]
    sizes = []
    with closing(journal.scheduler.map(build_package, missing)) as built:

        def take() -> dict[str, Any]:
            package = next(built)
            shutil.rmtree(folder / package.path.name, ignore_errors=True)
            package.path.rename(folder / package.path.name)
            return asdict(package.size)

        for number, task in enumerate(tasks):
            called = _called(task.part, number, len(tasks) - 2)
            progress(called, journal.share(called)[0])
            sizes.append(PackageSize(**journal.unit(task.name, take, _told, called)))
    return sizes


def _called(part: str | range, number: int, chunks: int) -> str:
    """What the plan calls the package of a part, the one after the first `number`."""
    if isinstance(part, range):
        return f"chunk {number} of {chunks}"
    return EMBEDDING_PACKAGE if part == EMBEDDING else HEAD_PACKAGE


def _told(size: Mapping[str, Any]) -> list[str]:
    return [f"{(size['weight_bytes'] + size['graph_bytes']) / 1e6:.1f} MB"]


def _ranges(checkpoint: Checkpoint, journal: Journal) -> list[LayerRange]:
    """`layer_ranges` of a few tokens, as a unit."""

    def run() -> list[dict[str, Any]]:
        tokens = probe_tokens(checkpoint, RANGE_TOKENS)[None]
        return [asdict(layer) for layer in layer_ranges(checkpoint, tokens)]

    return [LayerRange(**layer) for layer in journal.unit(RANGES, run)]


def _table_bits(checkpoint: Checkpoint, name: str) -> int | None:
    """The width of the embedding or the head, None for float16."""
    if f"{name}.codebook" not in checkpoint.tensors:
        return None
    entries = whole_codebook(name, checkpoint.read(f"{name}.codebook")).numel()
    return (entries - 1).bit_length()


def _metadata(packages: PackageSet, **more: object) -> dict[str, str]:
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
    config = checkpoint.spec.config
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    model_type = checkpoint.spec.architecture.model_type
    write_json(folder / "config.json", {"tokenizer_class": tokenizer_class, "model_type": model_type, **ends})
