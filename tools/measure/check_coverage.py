"""Whether the intervals that `anequant eval` states hold what they are intervals of.

All windows of a text give the full-text figures: KL, extra NLL (the logarithm of the ratio of perplexities),
the share of equal top tokens, and NLL. Then some of the windows are drawn at random without replacement,
many times, and each draw states its 95% interval as if it were all there is. About 19 of 20 intervals should
hold the figure of the full text; a draw that is a large part of all windows holds it more often.

    python tools/measure/check_coverage.py MODEL CHECKPOINT TEXT [--length 256] [--windows 40] [--times 20]

MODEL is the float model; the exit code is 1 where fewer than 17 of 20 hold, or as large a share of others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anequant.evaluation.evaluate import evaluate_text
from anequant.evaluation.intervals import average
from anequant.evaluation.quality import Quality

LEAST = 17 / 20
FIGURES = {"kl": "KL", "extra_nll": "extra NLL", "top1": "same top token", "nll": "NLL"}


@dataclass(frozen=True)
class Coverage:
    """A full-text figure, and how many of the intervals of `times` draws hold it."""

    name: str
    figure: float
    held: int
    times: int

    @property
    def suffices(self) -> bool:
        return self.held >= LEAST * self.times


def check_coverage(quality: Quality, windows: int, times: int, seed: int) -> list[Coverage]:
    """Draw `windows` of the windows of a quality that has a base, `times` times and alike for each figure."""
    generator = np.random.default_rng(seed)
    draws = [generator.choice(quality.windows, windows, replace=False) for _ in range(times)]
    found = []
    for name, title in FIGURES.items():
        values: Sequence[float] = getattr(quality.by_window, name)
        intervals = [average([values[number] for number in draw]).interval for draw in draws]
        figure = average(values).value
        held = sum(ends is not None and ends[0] <= figure <= ends[1] for ends in intervals)
        found.append(Coverage(title, figure, held, times))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("checkpoint")
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=40, help="windows of a draw")
    parser.add_argument("--times", type=int, default=20, help="draws")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    quality = evaluate_text(
        asked.checkpoint, asked.text, asked.model, windows=sys.maxsize, length=asked.length
    )
    if quality.windows <= asked.windows:
        sys.exit(
            f"the text has {quality.windows} windows of {asked.length} tokens, a draw wants {asked.windows}"
        )
    print(
        f"{quality.windows} windows of {asked.length} tokens, {asked.windows} in each of {asked.times} draws"
    )
    found = check_coverage(quality, asked.windows, asked.times, asked.seed)
    for one in found:
        print(f"{one.name}: {one.held} of {one.times} intervals hold the full-text figure {one.figure:.5f}")
    sys.exit(not all(one.suffices for one in found))


if __name__ == "__main__":
    main()
