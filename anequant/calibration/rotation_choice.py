"""Which rotations a recipe ends up with: drawn from its seed, read, measured, or learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, ModelSpec
from anequant.calibration.learn_rotations import LearnResult, RotationCourse, learn_rotations
from anequant.calibration.rotated_student import Lesson, RotatedStudent
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.rotation_files import read_rotations
from anequant.errors import UsageError
from anequant.jobs.control import Progress, silent
from anequant.quantization.online import plan_online
from anequant.recipe import Recipe
from anequant.reference.forward import ReferenceModel, Weights, run_to_final_states
from anequant.rotation.rotation_plan import RotationPlan, list_matrix_sizes, plan_rotations

MEASURED_WINDOWS = 8
"""Windows that candidates are measured on; learning sees the others."""


@dataclass(frozen=True)
class RotationChoice:
    """How R1 and R2 were found, beyond the recipe's words.

    seed      the one that stayed
    restarts  KL on the measured windows by seed, where there was a choice
    learned   None without learning
    """

    seed: int
    restarts: Mapping[int, float]
    learned: LearnResult | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "restarts": [{"seed": seed, "kl": kl} for seed, kl in self.restarts.items()],
            "learned": None if self.learned is None else asdict(self.learned),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> RotationChoice:
        """Return the choice that `to_dict` turned into these values."""
        restarts = {tried["seed"]: tried["kl"] for tried in values["restarts"]}
        learned = None if values["learned"] is None else LearnResult(**values["learned"])
        return RotationChoice(values["seed"], restarts, learned)


@dataclass(frozen=True)
class Rotations:
    """The plan, how it was found (None: the seed alone tells it), and the matrices to keep, by name."""

    plan: RotationPlan
    choice: RotationChoice | None = None
    matrices: Mapping[str, Tensor] | None = None


def check_rotations(spec: ModelSpec, recipe: Recipe, file: Path | None) -> None:
    """Raises UsageError unless a file of rotations is named exactly where the recipe asks for one, and for
    restarts without a rotation that depends on the seed; and what `plan_rotations` raises for a width that
    a rotation does not fit."""
    asked = "file" in (recipe.r1, recipe.r2)
    if asked and file is None:
        key = "r1" if recipe.r1 == "file" else "r2"
        raise UsageError(f"recipe key '{key}' is 'file', and no file is named", remedy="add --rotations FILE")
    if file is not None and not asked:
        raise UsageError(
            f"--rotations names '{file}', but r1 is '{recipe.r1}' and r2 '{recipe.r2}'",
            remedy="add --r1 file, --r2 file or both",
        )
    if recipe.restarts > 1 and {recipe.r1, recipe.r2} <= {"none", "file"}:
        raise UsageError(
            f"restarts tries seeds, and no seed tells r1 '{recipe.r1}' and r2 '{recipe.r2}'",
            remedy="draw r1 or r2, or use restarts = 1",
        )
    r1 = recipe.r1 if recipe.r1 in ("hadamard", "block-hadamard") else "none"
    plan_rotations(spec, replace(recipe, r1=r1, r2="hadamard" if recipe.r2 == "hadamard" else "none"))


def matrices_from_file(spec: ModelSpec, recipe: Recipe) -> dict[str, int]:
    """Return the names and sizes of the matrices that the recipe takes from a file of rotations."""
    sizes = list_matrix_sizes(spec, recipe)
    return {name: size for name, size in sizes.items() if getattr(recipe, name.partition(".")[0]) == "file"}


def choose_rotations(
    checkpoint: Checkpoint, recipe: Recipe, tokens: Tensor | None, file: Path | None, progress: Progress
) -> Rotations:
    """Return the rotations of `recipe` for a float checkpoint; `tokens` [n, length] calibrate, None where the
    recipe needs none.

    What the seed alone does not tell is made dense, so that the matrices, read back, rotate the same.
    Raises what `check_rotations`, `read_rotations` and `plan_rotations` raise.
    """
    check_rotations(checkpoint.spec, recipe, file)
    spec = checkpoint.spec
    matrices = {} if file is None else read_rotations(file, matrices_from_file(spec, recipe))
    basis = None
    if recipe.r1 == "pca":
        assert tokens is not None
        moment = _measure_residual_moment(checkpoint, tokens, progress.part("pca", 0.0, 0.2))
        basis = torch.linalg.eigh(moment).eigenvectors
    plans = {
        seed: plan_rotations(spec, replace(recipe, seed=seed), matrices=matrices, basis=basis)
        for seed in range(recipe.seed, recipe.seed + recipe.restarts)
    }
    plan = plans[recipe.seed]
    if recipe.restarts == 1 and not recipe.learn:
        if file is None and basis is None:
            return Rotations(plan)
        dense = plan.dense()
        return Rotations(dense, RotationChoice(recipe.seed, {}, None), dense.matrices())
    assert tokens is not None
    return _compare_and_learn(checkpoint, recipe, plans, tokens, progress.part("rotations", 0.2, 1.0))


def _measure_residual_moment(weights: Weights, tokens: Tensor, progress: Progress = silent) -> Tensor:
    """Return the mean of x x^T over the tokens [n, length] and over where layers and head read the stream:
    float64 [hidden_size, hidden_size].

    x is the stream as it enters each layer and leaves the last one, over its root mean square, as the
    linears see it once the norms' gains are folded: layers weigh alike, though the stream grows.
    """
    spec = weights.spec
    model = ReferenceModel(spec, torch.float32, weights.online)
    ones = torch.ones(spec.hidden_size)
    hidden = weights.read(f"{EMBEDDING}.weight")[tokens].float()
    moment = torch.zeros(spec.hidden_size, spec.hidden_size, dtype=torch.float64)
    for layer in range(spec.num_layers + 1):
        with torch.no_grad():
            rows = model.final_norm(hidden, ones).flatten(0, 1)
        moment += rows.T @ rows
        if layer < spec.num_layers:
            progress(f"layer {layer + 1}", layer / spec.num_layers)
            hidden = model.run_layer(layer, weights.layer(layer), hidden)
    return moment / (tokens.numel() * (spec.num_layers + 1))


def _compare_and_learn(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plans: Mapping[int, RotationPlan],
    tokens: Tensor,
    progress: Progress,
) -> Rotations:
    """Return the best plan by the KL of its quantized model, then learned from there if the recipe says
    so."""
    progress("float model", 0.0)
    lesson = Lesson(
        checkpoint.read(f"{EMBEDDING}.weight")[tokens].float(), run_to_final_states(checkpoint, tokens)
    )
    count = min(MEASURED_WINDOWS, max(1, len(tokens) // 2))
    measured = lesson.windows(slice(count))
    student = RotatedStudent(checkpoint, recipe, plan_online(checkpoint.spec, recipe))
    restarts: dict[int, float] = {}
    end = 0.3 if recipe.learn else 1.0
    for number, (seed, plan) in enumerate(plans.items() if len(plans) > 1 else ()):
        progress(f"seed {seed}", end * number / len(plans))
        restarts[seed] = student.divergence(plan, measured)
    best = min(restarts, key=lambda seed: restarts[seed], default=recipe.seed)
    plan, learned = plans[best].dense(), None
    if recipe.learn:
        rest = lesson.windows(slice(count, None)) if count < len(tokens) else lesson
        course = RotationCourse(rest, measured, recipe.learn, recipe.seed)
        plan, learned = learn_rotations(student, plan, course, progress.part("learn", end, 1.0))
    return Rotations(plan, RotationChoice(best, restarts, learned), plan.matrices())
