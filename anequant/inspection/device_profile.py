"""Packages on a Mac: where their operations run, how long they take, and whether they compute the same."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.checkpoints.places import find_packages
from anequant.checkpoints.source import SAMPLE_TEXT, has_tokenizer
from anequant.errors import UsageError
from anequant.jobs.control import Progress, silent
from anequant.reference.sources import read_text
from anequant.reference.windows import load_tokenizer
from anequant.runtime.coreml_backend import PackageModel
from anequant.runtime.generate import Decoder
from anequant.targets.coreml.device import (
    NEURAL_ENGINE,
    DevicePackage,
    Placement,
    ask_placements,
    count_by_device,
)
from anequant.targets.coreml.meta import PackageSet, read_meta
from anequant.versions import installed_versions

PLAIN_TOKENS = 64
"""A model without a tokenizer is fed the ids below this in turn."""


@dataclass(frozen=True)
class PackagePlacement:
    """Operations of a package by device, and those that the plan takes off the Neural Engine."""

    name: str
    operations: dict[str, int]
    elsewhere: tuple[Placement, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds: `load` until a fresh model's first logits, `prefill` of a batch, `token` the median of one."""

    load: float
    prefill: float
    token: float


@dataclass(frozen=True)
class Agreement:
    """The device's logits against the interpreter's: share of equal arg-max, largest relative difference."""

    positions: int
    top_token: float
    relative_error: float


@dataclass(frozen=True)
class DeviceProfile:
    system: dict[str, str]
    packages: tuple[PackagePlacement, ...]
    seconds: Timing
    agreement: Agreement

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile(folder: Path, tokens: int, *, progress: Progress = silent) -> DeviceProfile:
    """Profile the packages in `folder`, an output of convert or lower, decoding `tokens` tokens.

    Raises UnsupportedError anywhere but on macOS, InputError for a folder without packages, UsageError
    when the context holds no `tokens` after a batch.
    """
    DevicePackage.open(folder)
    part = find_packages(folder)
    packages = read_meta(part)
    if packages.batch + tokens > packages.context:
        raise UsageError(
            f"a batch of {packages.batch} and {tokens} tokens exceed the context of {packages.context}",
            remedy="lower --tokens",
        )
    placed = []
    for number, name in enumerate(packages.package_names):
        progress(f"plan of {name}", 0.4 * number / len(packages.package_names))
        placements = ask_placements(part / f"{name}.mlpackage")
        elsewhere = tuple(item for item in placements if item.device != NEURAL_ENGINE)
        placed.append(PackagePlacement(name, count_by_device(placements), elsewhere))
    ids = _tokens(part, packages, tokens)
    progress("device", 0.4)
    seconds, ours = time_decoding(lambda: PackageModel(part, DevicePackage.open), ids, packages.batch)
    progress("interpreter", 0.6)
    _, expected = time_decoding(lambda: PackageModel(part), ids, packages.batch)
    return DeviceProfile(_system(), tuple(placed), seconds, measure_agreement(ours, expected))


def time_decoding(open_model: Callable[[], Decoder], ids: Sequence[int], batch: int) -> tuple[Timing, Tensor]:
    """Time a batch of prefill and the tokens after it; return also logits [len(ids) - batch + 1, vocab].

    Everything is loaded, and run once, before prefill and tokens are timed.
    """
    begun = time.perf_counter()
    model = open_model()
    model.feed(ids[: batch + 1])
    load = time.perf_counter() - begun
    model.reset()
    rows, steps = [], []
    for start, end in [(0, batch), *((i, i + 1) for i in range(batch, len(ids)))]:
        begun = time.perf_counter()
        rows.append(model.feed(ids[start:end]))
        steps.append(time.perf_counter() - begun)
    return Timing(load, steps[0], statistics.median(steps[1:])), torch.stack(rows)


def measure_agreement(ours: Tensor, expected: Tensor) -> Agreement:
    """Compare logits [positions, vocab]; -inf is one that an arg-max head does not tell."""
    known = torch.isfinite(ours) & torch.isfinite(expected)
    error = torch.where(known, ours - expected, 0).abs().max() / expected[known].abs().max()
    same = (ours.argmax(-1) == expected.argmax(-1)).double().mean()
    return Agreement(len(ours), float(same), float(error))


def _tokens(folder: Path, packages: PackageSet, count: int) -> list[int]:
    length = packages.batch + count
    ids: list[int] = list(range(PLAIN_TOKENS))
    if has_tokenizer(folder):
        ids = load_tokenizer(folder)(read_text(SAMPLE_TEXT), add_special_tokens=False)["input_ids"]
    return (ids * (length // len(ids) + 1))[:length]


def _system() -> dict[str, str]:
    return {"macos": platform.mac_ver()[0], "machine": platform.machine(), **installed_versions()}
