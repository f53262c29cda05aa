"""Whether one way to quantize is better than another on the windows that both were measured on."""

from __future__ import annotations

from dataclasses import dataclass

from anequant.evaluation.intervals import Mean, average_differences
from anequant.evaluation.quality import Quality

BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"


@dataclass(frozen=True)
class Difference:
    """The KL of a trial less that of the one called `reference`, window by window; the verdict is BETTER or
    WORSE only where the interval excludes 0."""

    reference: str
    kl: Mean

    @property
    def verdict(self) -> str:
        if not self.kl.excludes_zero:
            return UNDECIDED
        return BETTER if self.kl.value < 0 else WORSE


def subtract_quality(ours: Quality, theirs: Quality, reference: str) -> Difference:
    """Return how `ours` differs from `theirs`, that of the trial called `reference`; both compare with the
    same base on the same windows."""
    assert ours.by_window.kl is not None and theirs.by_window.kl is not None
    return Difference(reference, average_differences(ours.by_window.kl, theirs.by_window.kl))
