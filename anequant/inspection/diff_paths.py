"""Two paths compared: their checkpoints, packages and assets, and on demand the logits of both."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.checkpoints.reader import Checkpoint, open_checkpoint, read_json
from anequant.checkpoints.source import SAMPLE_TEXT, has_tokenizer
from anequant.errors import InputError, UnsupportedError, UsageError
from anequant.evaluation.quality import summarise
from anequant.inspection.diff_assets import diff_assets, open_asset
from anequant.inspection.diff_checkpoints import CheckpointDifferences, diff_checkpoints, diff_keys
from anequant.inspection.diff_packages import PackageDifferences, diff_packages, pair_packages
from anequant.inspection.inspect import PACKAGE, Parts, find_parts
from anequant.jobs.control import Progress, silent
from anequant.reference.forward import logits
from anequant.reference.windows import choose_probe_tokens, read_text_windows
from anequant.runtime.coreml_backend import PackageModel
from anequant.targets.coreml.meta import META, read_meta

WINDOWS, LENGTH = 4, 128
PACKAGE_TOKENS = 64
"""The interpreter takes them one by one."""


@dataclass(frozen=True)
class LogitsDifference:
    """KL(A || B) in nats, share of equal arg-max, and the largest difference of a logit, on `tokens`."""

    tokens: int
    kl: float
    top1: float
    max_abs: float


@dataclass(frozen=True)
class PathDifferences:
    """`set` holds what meta.yaml says differently; `only_a` and `only_b` are packages without a counterpart.

    An asset of Core AI is the last of `packages`. What only one of the paths has, a checkpoint, packages or
    an asset, is not compared.
    """

    a: str
    b: str
    checkpoint: CheckpointDifferences | None
    packages: tuple[PackageDifferences, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    set: Mapping[str, tuple[Any, Any]]
    logits: LogitsDifference | None

    @property
    def same(self) -> bool:
        """Whether nothing differs; logits follow from the rest and do not count."""
        checkpoint = self.checkpoint is None or self.checkpoint.same
        packages = all(package.same for package in self.packages)
        return checkpoint and packages and not (self.only_a or self.only_b or self.set)

    def to_dict(self) -> dict[str, Any]:
        return {"same": self.same, **asdict(self)}


def diff(
    a: Path, b: Path, *, compare_logits: bool = False, text: Path | None = None, progress: Progress = silent
) -> PathDifferences:
    """Compare what two paths hold; `text` is what logits are computed on, None for the bundled one.

    Raises UsageError for two paths that have nothing in common to compare, and what opening them raises.
    """
    ours, theirs = find_parts(a), find_parts(b)
    kinds = ours.kind, theirs.kind
    pairs = [(getattr(ours, part), getattr(theirs, part)) for part in ("checkpoint", "packages", "asset")]
    if not any(one and other for one, other in pairs):
        raise UsageError(
            f"'{a}' is a {ours.kind}, '{b}' a {theirs.kind}",
            remedy="compare two checkpoints, two packages or two bundles",
        )
    if compare_logits and not any(one and other for one, other in pairs[:2]):
        raise UsageError(
            "logits are compared of checkpoints and packages",
            remedy="name checkpoints, or leave --logits out",
        )
    end = 0.5 if compare_logits else 1.0
    checkpoint = None
    if ours.checkpoint and theirs.checkpoint:
        opened = open_checkpoint(ours.checkpoint), open_checkpoint(theirs.checkpoint)
        checkpoint = diff_checkpoints(*opened, progress.part("tensors", 0.0, end))
    matched = list(pair_packages(ours.packages, theirs.packages)) if ours.packages and theirs.packages else []
    packages = []
    for number, (one, other) in enumerate(matched):
        if one is not None and other is not None:
            progress(one.name, end * number / len(matched))
            packages.append(diff_packages(one, other))
    told = diff_keys(_set(ours), _set(theirs)) if packages and PACKAGE not in kinds else {}
    if ours.asset is not None and theirs.asset is not None:
        assets = open_asset(ours.asset, ours.bundle), open_asset(theirs.asset, theirs.bundle)
        packages.append(diff_assets(*assets))
    last = progress.part("logits", end, 1.0)
    return PathDifferences(
        str(a),
        str(b),
        checkpoint,
        tuple(packages),
        tuple(one.name for one, other in matched if one is not None and other is None),
        tuple(other.name for one, other in matched if one is None and other is not None),
        told,
        _logits(ours, theirs, text, last) if compare_logits else None,
    )


def _set(parts: Parts) -> dict[str, Any]:
    folder = parts.packages[0].parent
    return asdict(read_meta(folder)) if (folder / META).is_file() else {}


def _logits(a: Parts, b: Parts, text: Path | None, progress: Progress) -> LogitsDifference:
    """Compare the logits of the checkpoints, or of the packages where there are none."""
    if a.checkpoint and b.checkpoint:
        opened = open_checkpoint(a.checkpoint), open_checkpoint(b.checkpoint)
        base, model = opened
        if base.spec.vocab_size != model.spec.vocab_size:
            sizes = f"{base.spec.vocab_size} and {model.spec.vocab_size}"
            raise InputError(f"vocabularies of {sizes} tokens have no logits to compare")
        tokens = _tokens(base, text)
        return diff_logits(tokens, logits(base, tokens), logits(model, tokens, progress=progress))
    folders = [parts.packages[0].parent for parts in (a, b)]
    for parts, folder in zip((a, b), folders, strict=True):
        if parts.kind == PACKAGE or not (folder / META).is_file():
            raise UsageError(
                "a package alone tells no logits", remedy=f"name folders of packages with their {META}"
            )
    models = [PackageModel(folder) for folder in folders]
    if not all(model.tells_all_logits for model in models):
        raise UnsupportedError("packages with an arg-max head tell no logits to compare")
    length = min(PACKAGE_TOKENS, *(model.context for model in models))
    tokens = read_text_windows(
        folders[0], read_json(folders[0] / "config.json"), text or SAMPLE_TEXT, count=1, length=length
    )
    base_logits, our_logits = ([model.feed_each(tokens[0].tolist())] for model in models)
    if base_logits[0].shape != our_logits[0].shape:
        raise InputError("vocabularies of two sizes have no logits to compare")
    return diff_logits(tokens, base_logits, our_logits)


def diff_logits(tokens: Tensor, base: Iterable[Tensor], ours: Iterable[Tensor]) -> LogitsDifference:
    """Compare logits [length, vocab] of each window of tokens [windows, length], one of each in memory at a
    time."""
    largest, kept = 0.0, deque[Tensor]()

    def watched() -> Iterator[Tensor]:
        nonlocal largest
        for window, other in zip(ours, base, strict=True):
            largest = max(largest, float((window - other).abs().max()))
            kept.append(other)
            yield window

    def others() -> Iterator[Tensor]:
        while True:
            yield kept.popleft()

    quality = summarise(tokens, watched(), others())
    assert quality.kl is not None and quality.top1 is not None
    return LogitsDifference(quality.tokens, max(quality.kl, 0.0), quality.top1, largest)


def _tokens(checkpoint: Checkpoint, text: Path | None) -> Tensor:
    if text is None and not has_tokenizer(checkpoint.folder):
        return torch.stack([choose_probe_tokens(checkpoint, LENGTH)])
    return read_text_windows(
        checkpoint.folder, checkpoint.spec.config, text or SAMPLE_TEXT, count=WINDOWS, length=LENGTH
    )
