"""What a comparison of ways to quantize holds, and which of them are worth having."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from anequant.checkpoints.stored_bits import StoredBits
from anequant.comparison.paired import Difference, subtract_quality
from anequant.evaluation.divergence import NoiseFloor
from anequant.evaluation.quality import Quality
from anequant.jobs.typed import to_plain

RECIPE, PEER = "recipe", "peer"
MEMORY_MISSING = "all ran in one process; anequant plan tells the peak of a recipe"


@dataclass(frozen=True)
class Trial:
    """One way to quantize; `kind` is recipe or peer, `on_ane` whether the Neural Engine runs its weights.

    `seconds` are those of quantizing, without calibration tokens. `front`: among those that it runs, none has
    both no more bits per weight and no larger KL. `difference` compares with the first trial, and is None for
    that one. Where it could not be run `failed` says why and what is measured is None; `exit_code` is that of
    the error, 0 for a peer that is not installed.
    """

    name: str
    kind: str
    on_ane: bool
    bits: StoredBits | None = None
    quality: Quality | None = None
    seconds: float | None = None
    front: bool = False
    difference: Difference | None = None
    failed: str | None = None
    exit_code: int = 0

    @property
    def point(self) -> tuple[float, float] | None:
        """Bits per weight and KL."""
        if self.bits is None or self.quality is None or self.quality.kl is None:
            return None
        return self.bits.whole, self.quality.kl

    @property
    def told(self) -> tuple[str, ...]:
        """What is worth showing of it in a line, the most important first."""
        if self.bits is None or self.quality is None:
            return "not run", str(self.failed)
        quality = self.quality
        return (
            f"KL {quality.kl:.4f}",
            f"extra NLL {quality.extra_nll:+.4f}",
            f"{self.bits.whole:.2f} bits per weight",
        )

    def to_dict(self) -> dict[str, Any]:
        quality = None if self.quality is None else self.quality.to_dict()
        difference = None
        if self.difference is not None:
            difference = {**to_plain(self.difference), "verdict": self.difference.verdict}
        return {**asdict(self), "quality": quality, "difference": difference}


@dataclass(frozen=True)
class Comparison:
    """`base` is the float model's own quality on `text`, in windows of `length` tokens, and `noise` how far
    float16 moves it; `calibration` says on which tokens recipes were calibrated and is None where none needed
    any."""

    model: str
    text: str
    length: int
    base: Quality
    noise: NoiseFloor
    calibration: Mapping[str, Any] | None
    trials: tuple[Trial, ...]

    @property
    def exit_code(self) -> int:
        """The exit code of the first error, 0 when all ran."""
        return next((trial.exit_code for trial in self.trials if trial.exit_code), 0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "text": self.text,
            "length": self.length,
            "base": self.base.to_dict(),
            "noise_floor": self.noise.to_dict(),
            "calibration": self.calibration,
            "trials": [trial.to_dict() for trial in self.trials],
            "missing": {"peak_memory": MEMORY_MISSING},
        }


def mark_front(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the trials, those marked that are on the Pareto front of bits per weight and KL."""
    points = [trial.point if trial.on_ane else None for trial in trials]

    def beaten(point: tuple[float, float]) -> bool:
        others = (other for other in points if other is not None and other != point)
        return any(other[0] <= point[0] and other[1] <= point[1] for other in others)

    return tuple(
        replace(trial, front=point is not None and not beaten(point))
        for trial, point in zip(trials, points, strict=True)
    )


def mark_differences(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the trials, those but the first with their difference from it where both could be run."""
    reference, *others = trials
    marked = [reference]
    for trial in others:
        if trial.quality is not None and reference.quality is not None:
            difference = subtract_quality(trial.quality, reference.quality, reference.name)
            trial = replace(trial, difference=difference)
        marked.append(trial)
    return tuple(marked)
