"""A quantized checkpoint on its way to packages: what the steps of lowering share."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from anequant.architectures.spec import EMBEDDING, HEAD
from anequant.checkpoints.foreign import complete_codebook
from anequant.checkpoints.layers import read_projection_bits
from anequant.checkpoints.manifest import hash_checkpoint, write_manifest
from anequant.checkpoints.reader import Checkpoint, read_object
from anequant.checkpoints.source import TOKENIZER_FILES
from anequant.checkpoints.writer import write_json
from anequant.jobs.journal import Journal
from anequant.jobs.task_files import passing_folder
from anequant.request import LowerRequest
from anequant.targets.coreml.build import build_package
from anequant.targets.coreml.lowerable import check_lowering
from anequant.targets.coreml.meta import PackageSet, write_meta
from anequant.targets.shared.geometry import count_head_parts, split_layers
from anequant.targets.shared.headroom import Headroom
from anequant.targets.shared.package_task import BuiltPackage, PackageSize, PackageTask


@dataclass(frozen=True)
class LowerResult:
    """The packages that were written, and how their numbers keep inside float16."""

    packages: tuple[PackageSize, ...]
    headroom: Headroom

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(eq=False)
class Lowering:
    """What the steps that write packages to `folder` hand on, each to those after it.

    There are `chunks` packages of layers; `files` closes what is open. `headroom` is set by the step that
    measures ranges, `sizes` by every package.
    """

    request: LowerRequest
    chunks: int
    folder: Path
    journal: Journal
    files: ExitStack
    headroom: Headroom | None = None
    sizes: list[PackageSize] = field(default_factory=list)
    _built: Generator[BuiltPackage, None, None] | None = None
    _hashes: Future[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        """Begin to hash the checkpoint beside the steps; raises as `check_lowering`."""
        check_lowering(self.checkpoint.spec, self.request.lowering, self.checkpoint.online)
        beside = self.files.enter_context(ThreadPoolExecutor(1))
        self._hashes = beside.submit(hash_checkpoint, self.checkpoint)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.request.checkpoint

    @property
    def result(self) -> LowerResult:
        """What was written, once the steps are done."""
        assert self.headroom is not None
        return LowerResult(tuple(self.sizes), self.headroom)

    @cached_property
    def packages(self) -> PackageSet:
        """What meta.yaml says of the packages."""
        spec, options = self.checkpoint.spec, self.request.lowering
        return PackageSet(
            model=self.request.name,
            architecture=spec.architecture.model_type,
            prefix=options.prefix or spec.architecture.package_prefix,
            context=options.context,
            batch=options.batch,
            chunks=self.chunks,
            head_parts=count_head_parts(spec),
            lut_embeddings=_table_bits(self.checkpoint, EMBEDDING),
            lut_ffn=min(read_projection_bits(self.checkpoint).values()),
            lut_head=_table_bits(self.checkpoint, HEAD),
            vocab_size=spec.vocab_size,
            argmax=options.argmax,
        )

    @cached_property
    def tasks(self) -> Sequence[PackageTask]:
        """A task for every package, in running order; the headroom is known by then."""
        assert self.headroom is not None
        home = self.files.enter_context(passing_folder(self.journal.tasks))
        options, layers = self.request.lowering, self.checkpoint.spec.num_layers
        return [
            PackageTask(name, part, self.request.folder, home, options, self.headroom, metadata)
            for name, part, metadata in _list_parts(self.packages, layers)
        ]

    def build(self, number: int) -> PackageSize:
        """Build the package of a number, which is the first that is missing, and put it into the folder.

        All packages from it on are handed to the scheduler at once.
        """
        if self._built is None:
            made = self.journal.scheduler.map(build_package, self.tasks[number:])
            self._built = self.files.enter_context(closing(made))
        package = next(self._built)
        place = self.folder / package.path.name
        shutil.rmtree(place, ignore_errors=True)
        package.path.rename(place)
        return package.size

    def write_files(self) -> None:
        """Write what lies beside the packages."""
        assert self.headroom is not None
        write_meta(self.folder, self.packages)
        _copy_tokenizer(self.folder, self.checkpoint)
        contents = {
            "checkpoint": self._hashes.result(),
            "options": {**asdict(self.request.lowering), "chunks": self.chunks},
            "packages": [asdict(size) for size in self.sizes],
            "headroom": asdict(self.headroom),
        }
        write_manifest(self.folder, "packages", contents)


def _list_parts(packages: PackageSet, layers: int) -> Iterator[tuple[str, str | range, dict[str, str]]]:
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


def _table_bits(checkpoint: Checkpoint, name: str) -> int | None:
    """The width of the embedding or the head, None for float16."""
    if f"{name}.codebook" not in checkpoint.tensors:
        return None
    entries = complete_codebook(name, checkpoint.read(f"{name}.codebook")).numel()
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


def _copy_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """Copy the tokenizer's files, and write of config.json what runtimes read."""
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
