"""An asset of Core AI is what was meant: its constants read back, and Apple's own runtime on it.

Apple's interpreter takes tens of nanoseconds a product, so a large model is run on as many of its first
layers as a minute allows, with the norm and the head behind them: an asset of the same constants, copied from
the file that was written. How many layers that were is part of the result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anequant.checkpoints.layers import open_quantized
from anequant.checkpoints.manifest import hash_checkpoint
from anequant.checkpoints.places import BUNDLE_KIND
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import VerificationError
from anequant.jobs.control import Progress, silent
from anequant.reference.forward import logits
from anequant.reference.windows import choose_probe_tokens
from anequant.runtime.coreml_backend import run_package_by_package
from anequant.targets.coreai.assemble import cut_design
from anequant.targets.coreai.bundle import find_asset, read_design
from anequant.targets.coreai.design import Design, Sizes
from anequant.targets.coreai.host import Host
from anequant.targets.coreai.runner import Runner
from anequant.targets.coreai.stored import derive_asset, verify_hash
from anequant.targets.coreml.meta import read_meta
from anequant.targets.shared.agreement import compare_logits, compare_rounding
from anequant.verification.asset_constants import verify_asset_constants
from anequant.verification.files import failing, verify_files

MOST_SECONDS = 60.0
DECODE = 16
"""Tokens that are fed one by one after the prompt, where the whole model is run."""

FEWEST_DECODE = 4
SECONDS_A_PRODUCT, SECONDS_A_WEIGHT = 15e-9, 60e-9
"""Of Apple's interpreter: a product of two numbers, and a weight looked up at every call; measured."""

LARGEST_APART = 1e-2


@dataclass(frozen=True)
class AssetCheck:
    """How an asset on disk compares with the checkpoint it was made from, run by Apple's interpreter.

    constants       that equal the checkpoint's, bit for bit
    layers, of      how many of the model's layers were run, and how many it has
    window          positions at once
    prompt          tokens that went through prompt_opt
    positions       at which logits were compared, those after the prompt in decode
    agreement, ties, relative_error, rounding   as in PackageCheck
    witness         the largest difference between the logits of the asset and of the Core ML packages, which
                    our interpreter ran, over the largest logit; None where they were not compared
    """

    constants: int
    layers: int
    of: int
    window: int
    prompt: int
    positions: int
    agreement: float
    ties: int
    relative_error: float
    rounding: float | None
    witness: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Extent:
    """How much of a model is run: its first layers, windows of so many positions, tokens decoded after two of
    them; and the seconds that this takes Apple's interpreter."""

    layers: int
    window: int
    decode: int
    seconds: float


def choose_extent(sizes: Sizes, ladder: Sequence[int]) -> Extent:
    """Everything where that takes Apple's interpreter no more than MOST_SECONDS, else what does, at least a
    layer."""
    head = sizes.hidden * sizes.vocabulary
    layer = sizes.hidden * (2 * sizes.heads * sizes.head_dim + 2 * sizes.keys + 3 * sizes.intermediate)

    def price(window: int, decode: int) -> float:
        """Seconds a weight: two windows twice, and a smallest window for each token decoded."""
        positions = 4 * window + decode * ladder[0]
        return positions * SECONDS_A_PRODUCT + (4 + decode) * SECONDS_A_WEIGHT

    whole = price(ladder[-1], DECODE) * (head + sizes.layers * layer)
    if whole <= MOST_SECONDS:
        return Extent(sizes.layers, ladder[-1], DECODE, whole)
    short = price(ladder[0], FEWEST_DECODE)
    layers = min(max(int((MOST_SECONDS / short - head) / layer), 1), sizes.layers)
    return Extent(layers, ladder[0], FEWEST_DECODE, short * (head + layers * layer))


def verify_bundle(
    folder: Path, checkpoint_folder: Path, packages: Path | None = None, *, progress: Progress = silent
) -> AssetCheck:
    """Check hashes, every constant, and what Apple's runtime computes, beside the checkpoint in transformers
    and the `packages` of the same checkpoint in our interpreter.

    Raises VerificationError when any of that is not as it should be, or the runtime fails; UnsupportedError
    where Core AI is not installed.
    """
    progress("hashes", 0.0)
    recorded = verify_files(folder, BUNDLE_KIND)
    checkpoint = open_quantized(checkpoint_folder)
    if recorded.get("checkpoint") != hash_checkpoint(checkpoint):
        raise VerificationError(f"the asset was not made from '{checkpoint_folder}'", where=str(folder))
    with failing(folder):
        asset = find_asset(folder)
        verify_hash(asset)
        design, headroom = read_design(folder)
        constants = verify_asset_constants(
            asset, design, checkpoint, headroom, progress.part("constants", 0.0, 0.3)
        )
    run = RunAsset(asset, design, choose_extent(design.sizes, design.ladder))
    return _compare(run, checkpoint, constants, packages, progress.part("run", 0.3, 1.0))


def _compare(
    run: RunAsset, checkpoint: Checkpoint, constants: int, packages: Path | None, progress: Progress
) -> AssetCheck:
    """Run the asset and the model in transformers on the same tokens, and judge the logits."""
    extent, sizes = run.extent, run.design.sizes
    online = checkpoint.online
    prompt = 2 * extent.window
    tokens = choose_probe_tokens(checkpoint, prompt + extent.decode)
    cut = cut_checkpoint(checkpoint, extent.layers)
    progress("checkpoint in transformers", 0.0)
    plain = next(logits(replace(cut, online=online.rotations), tokens[None]))
    progress("Apple's runtime", 0.1)
    ours = run.compute(tokens, prompt, rounding=False)
    result = compare_logits(constants, prompt, ours, plain, str(run.asset))
    rounding = None
    if online.activations:
        expected = next(logits(cut, tokens[None]))
        ours = run.compute(tokens, prompt, rounding=True)
        rounding = compare_rounding(ours, expected, plain, str(run.asset))
    witness = None
    if packages is not None and extent.layers == sizes.layers:
        progress("Core ML packages", 0.8)
        witness = compare_with_packages(ours, packages, tokens, prompt, progress.part("packages", 0.8, 1.0))
    return AssetCheck(
        constants,
        extent.layers,
        sizes.layers,
        extent.window,
        prompt,
        result.positions,
        result.agreement,
        result.ties,
        result.relative_error,
        rounding,
        witness,
    )


def compare_with_packages(
    ours: Tensor, packages: Path, tokens: Tensor, prompt: int, progress: Progress
) -> float | None:
    """Return how far logits [n, V] are from those of packages in our interpreter, over the largest logit.

    None where packages tell only their best tokens, or hold too few. Whole batches of the packages go through
    prefill. Raises VerificationError when they are LARGEST_APART.
    """
    meta = read_meta(packages)
    if meta.argmax or meta.context < len(tokens):
        return None
    batches = prompt // meta.batch * meta.batch
    if not batches:
        return None
    theirs = run_package_by_package(packages, tokens, batches, progress)
    ours = ours[batches - 1 :]
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    if not apart <= LARGEST_APART:
        raise VerificationError(
            f"Apple's runtime on the asset and our interpreter on the packages are {apart:.2e} apart",
            where=str(packages),
            remedy=f"at most {LARGEST_APART:.0e} is accepted",
        )
    return apart


@dataclass(frozen=True)
class RunAsset:
    """An asset on disk, its design, and how much of it is to be run."""

    asset: Path
    design: Design
    extent: Extent

    def compute(self, tokens: Tensor, prompt: int, *, rounding: bool) -> Tensor:
        """Logits [n, V] for what follows each of n tokens: those of the prompt by `extend`, two windows; the
        others one by one, after `prompt_opt` has taken the prompt."""
        extent, ids = self.extent, tokens.tolist()
        with tempfile.TemporaryDirectory() as scratch:
            asset, design = self._derive(Path(scratch), rounding=rounding)
            with Runner(asset) as runner:
                host = Host(runner, design)
                first = host.score(ids[:prompt], extent.window)
                host.fill(ids[:prompt], extent.window)
                rest = [host.feed([token]) for token in ids[prompt:]]
        return torch.from_numpy(np.stack([*first, *rest])).float()

    def _derive(self, scratch: Path, *, rounding: bool) -> tuple[Path, Design]:
        """The asset itself, or one of its first layers or without rounding, of the same constants."""
        design = cut_design(self.design, self.extent.layers)
        design = design if rounding else replace(design, steps={})
        if design == self.design:
            return self.asset, design
        derived = scratch / "derived.aimodel"
        derive_asset(self.asset, design, derived)
        return derived, design


def cut_checkpoint(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The checkpoint with its first layers only."""
    spec = checkpoint.spec
    config = {**spec.config, "num_hidden_layers": layers}
    if spec.config.get("layer_types"):
        config["layer_types"] = list(spec.config["layer_types"])[:layers]
    return replace(checkpoint, spec=replace(spec, config=config, num_layers=layers))
