"""The steps that lower a checkpoint, and those that check what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anequant.architectures.spec import EMBEDDING, HEAD
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.source import has_tokenizer
from anequant.jobs.step import AnyStep
from anequant.lower_options import AssetOptions, LowerOptions
from anequant.pipeline.steps.asset_checks import LintAsset, VerifyAsset
from anequant.pipeline.steps.build_asset import BuildAsset, WriteBundleFiles
from anequant.pipeline.steps.build_packages import BuildChunk, BuildPackage, BuildTable, WritePackageFiles
from anequant.pipeline.steps.checks import (
    Lint,
    MeasureQuality,
    VerifyCheckpoint,
    VerifyPackages,
    WriteConversionFiles,
)
from anequant.pipeline.steps.magnitudes import MeasureRanges
from anequant.pipeline.steps.sizes import Facts
from anequant.targets.shared.geometry import find_least_chunks, split_layers


def list_conversion(
    facts: Facts, options: LowerOptions | None, asset: AssetOptions | None
) -> Iterator[AnyStep]:
    """The steps of a conversion after its checkpoint is written."""
    packages = [] if options is None else list(list_packages(facts.written, options))
    built = None if asset is None else BuildAsset(facts.written, asset)
    yield MeasureRanges(facts.written)
    if options is not None:
        yield from packages
        yield WritePackageFiles(packages)
    if built is not None:
        yield built
        yield WriteBundleFiles(built)
    yield VerifyCheckpoint(facts)
    if options is not None:
        yield VerifyPackages(facts, packages, options)
        yield Lint(facts)
    if built is not None:
        yield VerifyAsset(facts, built)
        yield LintAsset(facts, built)
    if has_tokenizer(facts.checkpoint.folder):
        yield MeasureQuality(facts)
    yield WriteConversionFiles(facts, packages, built)


def list_packages(written: Checkpoint, options: LowerOptions) -> Iterator[BuildPackage]:
    """The steps that build the packages of a checkpoint, in running order."""
    chunks = options.chunks or find_least_chunks(written, options.context, options.max_chunk_mb)
    yield BuildTable(written, 0, EMBEDDING)
    for number, layers in enumerate(split_layers(written.spec.num_layers, chunks), 1):
        yield BuildChunk(written, number, layers, chunks, options.context)
    yield BuildTable(written, chunks + 1, HEAD)


def count_chunks(steps: Sequence[AnyStep]) -> int:
    """Return how many packages of layers the steps build."""
    return sum(isinstance(step, BuildChunk) for step in steps)
