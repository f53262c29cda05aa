"""Learning R1 and R2: descent on the divergence of the quantized model (SpinQuant, Liu et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from anequant.calibration.distill import Lesson
from anequant.calibration.quantized_twin import RotatedStudent
from anequant.jobs.control import Progress, silent
from anequant.rotation.cayley import cayley_step
from anequant.rotation.rotation_plan import RotationPlan

WINDOWS_A_STEP = 4
LEARNING_RATE = 1.5
MOMENTUM = 0.9
EVALUATE_EVERY = 10


@dataclass(frozen=True)
class LearnResult:
    """KL on the held-out windows before and after; `steps` were taken until the best state."""

    steps: int
    held_out_before: float
    held_out_after: float


def learn_rotations(
    student: RotatedStudent,
    plan: RotationPlan,
    lesson: Lesson,
    held_out: Lesson,
    *,
    steps: int,
    seed: int,
    progress: Progress = silent,
) -> tuple[RotationPlan, LearnResult]:
    """The plan with R1 and R2 that were best on `held_out`, dense; it starts from `plan`'s own.

    Cayley descent with momentum, its rate falling as a half cosine.
    """
    best = current = plan.dense()
    first = least = student.divergence(current, held_out)
    best_step = 0
    matrices = current.matrices()
    momenta = {name: torch.zeros_like(matrix) for name, matrix in matrices.items()}
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for step in range(1, steps + 1):
        progress(f"step {step} of {steps}, held-out KL {least:.4f}", step / steps)
        rate = LEARNING_RATE * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        if len(queue) < WINDOWS_A_STEP:
            queue += torch.randperm(len(lesson.taught), generator=generator).tolist()
        chosen, queue = queue[:WINDOWS_A_STEP], queue[WINDOWS_A_STEP:]
        _, gradients = student.gradients(current, Lesson(lesson.embedded[chosen], lesson.taught[chosen]))
        for name, gradient in gradients.items():
            matrices[name] = cayley_step(matrices[name], gradient, momenta[name], rate, MOMENTUM)
        current = current.with_matrices(matrices)
        if step % EVALUATE_EVERY == 0 or step == steps:
            loss = student.divergence(current, held_out)
            if loss < least:
                best, least, best_step = current, loss, step
    return best, LearnResult(best_step, first, least)
