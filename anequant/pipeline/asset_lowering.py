"""A quantized checkpoint on its way to an asset of Core AI: what the steps of that share."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anequant.checkpoints.manifest import write_manifest
from anequant.checkpoints.places import BUNDLE_KIND
from anequant.checkpoints.reader import Checkpoint
from anequant.jobs.control import Progress
from anequant.jobs.journal import Journal
from anequant.jobs.step import AnyStep
from anequant.lower_options import AssetOptions
from anequant.pipeline.hashing import begin_hashing
from anequant.request import LowerRequest
from anequant.targets.coreai.assemble import AssetSize, build_asset
from anequant.targets.coreai.bundle import name_asset, write_bundle, write_design
from anequant.targets.shared.headroom import Headroom


@dataclass(frozen=True)
class AssetResult:
    """The asset that was written, and how its numbers keep inside float16."""

    size: AssetSize
    headroom: Headroom

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(eq=False)
class AssetLowering:
    """What the steps that write a bundle to `folder` hand on, each to those after it.

    `headroom` is set by the step that measures ranges, or given; `size` by the step that writes the asset.
    """

    request: LowerRequest
    folder: Path
    files: ExitStack
    headroom: Headroom | None = None
    size: AssetSize | None = None
    _hashes: Future[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        """Begin to hash the checkpoint beside the steps."""
        self._hashes = begin_hashing(self.checkpoint, self.files)

    @property
    def options(self) -> AssetOptions:
        assert isinstance(self.request.lowering, AssetOptions)
        return self.request.lowering

    @property
    def checkpoint(self) -> Checkpoint:
        return self.request.checkpoint

    @property
    def result(self) -> AssetResult:
        """What was written, once the steps are done."""
        assert self.headroom is not None and self.size is not None
        return AssetResult(self.size, self.headroom)

    def build(self, progress: Progress) -> AssetSize:
        """Write the asset, in the place of one that an interrupted run left, and its design."""
        assert self.headroom is not None
        asset = self.folder / name_asset(self.request.name)
        shutil.rmtree(asset, ignore_errors=True)
        options, headroom = self.options, self.headroom
        design, size = build_asset(self.request.folder, asset, options, headroom, progress=progress)
        write_design(self.folder, design, headroom)
        return size

    def write_files(self) -> None:
        """Write what lies beside the asset."""
        assert self.size is not None
        write_bundle(self.folder, self.size.name, self.request.name, self.checkpoint, self.options.context)
        contents = {"checkpoint": self._hashes.result(), "options": asdict(self.options)}
        write_manifest(self.folder, BUNDLE_KIND, contents)


def run_asset_lowering(
    request: LowerRequest,
    folder: Path,
    journal: Journal,
    steps: Sequence[AnyStep],
    headroom: Headroom | None = None,
) -> AssetResult:
    """Do the steps of writing an asset into a folder of a job's output."""
    with ExitStack() as files:
        state = AssetLowering(request, folder, files, headroom)
        for step in steps:
            journal.do(step, state)
        return state.result
