"""A quantized checkpoint on its way to packages: what the steps of lowering share."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from anequant.checkpoints.manifest import write_manifest
from anequant.checkpoints.reader import Checkpoint
from anequant.jobs.journal import Journal
from anequant.jobs.task_files import passing_folder
from anequant.lower_options import LowerOptions
from anequant.pipeline.hashing import begin_hashing
from anequant.request import LowerRequest
from anequant.targets.coreml.build import build_package
from anequant.targets.coreml.lowerable import check_lowering
from anequant.targets.coreml.meta import PackageSet
from anequant.targets.coreml.package_set import describe_packages, list_parts, write_side_files
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
        check_lowering(self.checkpoint.spec, self.options, self.checkpoint.online)
        self._hashes = begin_hashing(self.checkpoint, self.files)

    @property
    def options(self) -> LowerOptions:
        assert isinstance(self.request.lowering, LowerOptions)
        return self.request.lowering

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
        request = self.request
        return describe_packages(self.checkpoint, self.options, request.name, self.chunks)

    @cached_property
    def tasks(self) -> Sequence[PackageTask]:
        """A task for every package, in running order; the headroom is known by then."""
        assert self.headroom is not None
        home = self.files.enter_context(passing_folder(self.journal.tasks))
        options, layers = self.options, self.checkpoint.spec.num_layers
        return [
            PackageTask(name, part, self.request.folder, home, options, self.headroom, metadata)
            for name, part, metadata in list_parts(self.packages, layers)
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
        write_side_files(self.folder, self.packages, self.checkpoint)
        contents = {
            "checkpoint": self._hashes.result(),
            "options": {**asdict(self.options), "chunks": self.chunks},
            "packages": [asdict(size) for size in self.sizes],
            "headroom": asdict(self.headroom),
        }
        write_manifest(self.folder, "packages", contents)
