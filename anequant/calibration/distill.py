"""Distillation: the quantized model learns the float model's next-token distribution.

The loss is KL(float || quantized) over all positions of a few windows of the calibration sources. Codes move
(`tunable_linear`), at a rate that is a hundredth of the distance between entries, and scales, codebooks,
biases and norm gains beside them at a slower one; both rise over the first steps and fall with a cosine to
the end of the budget. The state that is best on held-out windows stays.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from anequant.calibration.student import Rates, Student
from anequant.calibration.tuning_state import Position, Tuned, load_state, record, save_state
from anequant.jobs.control import Progress, silent

WINDOWS_A_STEP = 8
LATENT_RATE, OTHER_RATE = 3e-3, 5e-4
WARM_UP = 10
EVALUATE_EVERY = 25

HELD_OUT, HELD_OUT_SHARE = 16, 6
"""Windows to judge by: so many, or a sixth of few."""


@dataclass(frozen=True)
class Budget:
    """How long to learn: so many steps, or where these are 0, so many seconds."""

    steps: int
    seconds: float = 0.0

    def share(self, step: int, elapsed: float) -> float:
        """Return how much of it is used, 0 to 1, after `step` steps and so many seconds."""
        return min(1.0, step / self.steps if self.steps else elapsed / self.seconds)


@dataclass(frozen=True)
class Course:
    """What a student learns from: each step is on a few windows of `lesson` [n, length] that `seed` draws,
    and the state that is best on `held_out` [n, length] stays."""

    lesson: Tensor
    held_out: Tensor
    budget: Budget
    seed: int


@dataclass(frozen=True)
class TuneResult:
    """KL on the held-out windows before and after; `steps` were taken until the best state, `taken`
    altogether, on `windows` to learn from. `moved` is the share of codes that rounding chose otherwise."""

    steps: int
    taken: int
    windows: int
    moved: float
    held_out_before: float
    held_out_after: float


def hold_out_windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the windows [n, length] to learn from and which, evenly spaced, to judge by; a single
    one serves both."""
    count = len(tokens)
    if count == 1:
        return tokens, tokens
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[torch.linspace(0, count - 1, min(HELD_OUT, max(1, count // HELD_OUT_SHARE))).long()] = True
    return tokens[~held_out], tokens[held_out]


def distill(
    student: Student, course: Course, folder: Path | None = None, progress: Progress = silent
) -> tuple[Tuned, TuneResult]:
    """Train the student's layers and its final gain; return the state that was best on the held-out windows.

    The state of training is kept in `folder`, from where a later run goes on. Raises DamagedWork for a state
    that is damaged.
    """
    begun, budget = time.monotonic(), course.budget
    generator = torch.Generator().manual_seed(course.seed)
    started = record(student)
    resumed = None if folder is None else load_state(folder, student, generator)
    if resumed is None:
        loss = student.divergence(course.held_out)
        best, at = started, Position(0, 0.0, (), loss, loss, 0)
    else:
        best, at = resumed
        begun -= at.seconds
    used = budget.share(at.step, at.seconds)
    while used < 1:
        step, queue = at.step + 1, list(at.queue)
        progress(f"step {step}, held-out KL {at.least:.4f}", used)
        factor = min(1.0, step / WARM_UP) * (1 + math.cos(math.pi * used)) / 2
        while len(queue) < min(WINDOWS_A_STEP, len(course.lesson)):
            queue += torch.randperm(len(course.lesson), generator=generator).tolist()
        student.learn(course.lesson[queue[:WINDOWS_A_STEP]], Rates(LATENT_RATE * factor, OTHER_RATE * factor))
        at = replace(at, step=step, queue=tuple(queue[WINDOWS_A_STEP:]), seconds=time.monotonic() - begun)
        used = budget.share(step, at.seconds)
        if step % EVALUATE_EVERY == 0 or used >= 1:
            loss = student.divergence(course.held_out)
            if loss < at.least:
                best, at = record(student), replace(at, least=loss, best_step=step)
            if folder is not None and used < 1:
                save_state(folder, student, best, at, generator)
    moved = _count_moved(started, best)
    return best, TuneResult(at.best_step, at.step, len(course.lesson), moved, at.first, at.least)


def _count_moved(before: Tuned, after: Tuned) -> float:
    """Return the share of codes that differ."""
    pairs = [
        (linear.codes, other.linears[name].codes)
        for one, other in zip(before.layers, after.layers, strict=True)
        for name, linear in one.linears.items()
    ]
    return sum(int((one != other).sum()) for one, other in pairs) / sum(one.numel() for one, _ in pairs)
