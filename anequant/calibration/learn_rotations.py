"""Learning R1 and R2: descent on the divergence of the quantized model (SpinQuant, Liu et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from anequant.calibration.rotated_student import Lesson, RotatedStudent
from anequant.jobs.control import Progress, silent
from anequant.rotation.cayley import cayley_step
from anequant.rotation.rotation_plan import RotationPlan

WINDOWS_A_STEP = 4
LEARNING_RATE = 1.5
MOMENTUM = 0.9
EVALUATE_EVERY = 10


@dataclass(frozen=True)
class RotationCourse:
    """What rotations learn from, and for how many steps: each is on a few windows of `lesson` that `seed`
    draws, and the state that is best on `held_out` stays."""

    lesson: Lesson
    held_out: Lesson
    steps: int
    seed: int


@dataclass(frozen=True)
class LearnResult:
    """KL on the held-out windows before and after; `steps` were taken until the best state."""

    steps: int
    held_out_before: float
    held_out_after: float


def learn_rotations(
    student: RotatedStudent, plan: RotationPlan, course: RotationCourse, progress: Progress = silent
) -> tuple[RotationPlan, LearnResult]:
    """Return the plan with R1 and R2 that were best on the held-out windows, dense, starting from those of
    `plan`.

    Cayley descent with momentum, its rate falling as a half cosine.
    """
    best, steps = plan.dense(), course.steps
    current = best
    first = least = student.divergence(current, course.held_out)
    best_step = 0
    matrices = current.matrices()
    momenta = {name: torch.zeros_like(matrix) for name, matrix in matrices.items()}
    generator = torch.Generator().manual_seed(course.seed)
    queue: list[int] = []
    for step in range(1, steps + 1):
        progress(f"step {step} of {steps}, held-out KL {least:.4f}", step / steps)
        rate = LEARNING_RATE * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        if len(queue) < WINDOWS_A_STEP:
            queue += torch.randperm(len(course.lesson.taught), generator=generator).tolist()
        chosen, queue = queue[:WINDOWS_A_STEP], queue[WINDOWS_A_STEP:]
        _, gradients = student.gradients(current, course.lesson.windows(chosen))
        for name, gradient in gradients.items():
            matrices[name], momenta[name] = cayley_step(
                matrices[name], gradient, momenta[name], rate, MOMENTUM
            )
        current = current.with_matrices(matrices)
        if step % EVALUATE_EVERY == 0 or step == steps:
            loss = student.divergence(current, course.held_out)
            if loss < least:
                best, least, best_step = current, loss, step
    return best, LearnResult(best_step, first, least)
