"""What a distillation has come to, in a file, so that a later run goes on from there with the same result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from anequant.calibration.student import LayerState, Student
from anequant.jobs.typed import from_plain, to_plain
from anequant.jobs.work_folder import reading_work
from anequant.quantization.linear import QuantizedLinear
from anequant.strict import parse_json

FILE = "tuning.safetensors"
POSITION = "position"
MEAN, SQUARE = "exp_avg", "exp_avg_sq"
"""torch's names of Adam's moments."""


@dataclass(frozen=True, eq=False)
class Tuned:
    """A state that a student was in: its layers, and the final norm's gain."""

    layers: tuple[LayerState, ...]
    gain: Tensor


@dataclass(frozen=True)
class Position:
    """Where a distillation stands: steps and seconds so far, windows that are drawn and not yet learned from,
    and the KL on held-out windows at first and at best, which was after `best_step` steps."""

    step: int
    seconds: float
    queue: tuple[int, ...]
    first: float
    least: float
    best_step: int


def record(student: Student) -> Tuned:
    """Return the state that a student is in."""
    return Tuned(tuple(layer.current() for layer in student.layers), student.heads.gain.detach().clone())


def save_state(
    folder: Path, student: Student, best: Tuned, position: Position, generator: torch.Generator
) -> None:
    """Write all of it to FILE in the folder, in one step."""
    tensors = {"generator": generator.get_state()}
    for number, (optimizer, leaves) in enumerate(zip(student.optimizers, student.leaves, strict=True)):
        for name, leaf in leaves.items():
            tensors[f"{number}.{name}"] = leaf.detach()
            for key in (MEAN, SQUARE):
                tensors[f"{number}.{name}.{key}"] = optimizer.state[leaf][key]
    for name, tensor in _list_tensors(best).items():
        tensors[f"best.{name}"] = tensor
    unfinished = folder / f"{FILE}.unfinished"
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        unfinished,
        {POSITION: json.dumps(to_plain(position))},
    )
    os.replace(unfinished, folder / FILE)


def load_state(folder: Path, student: Student, generator: torch.Generator) -> tuple[Tuned, Position] | None:
    """Bring the student and the generator to where an earlier run had them; return its best state and its
    position, None where it left none. Raises DamagedWork for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    with reading_work(path), safe_open(path, "pt") as file:
        position = from_plain(Position, parse_json(file.metadata()[POSITION]))
        generator.set_state(file.get_tensor("generator"))
        for number, (optimizer, leaves) in enumerate(zip(student.optimizers, student.leaves, strict=True)):
            for name, leaf in leaves.items():
                leaf.data.copy_(file.get_tensor(f"{number}.{name}"))
                moments = {key: file.get_tensor(f"{number}.{name}.{key}") for key in (MEAN, SQUARE)}
                optimizer.state[leaf] = {"step": torch.tensor(float(position.step)), **moments}
        best = record(student)
        names = _list_tensors(best)
        kept = {name: file.get_tensor(f"best.{name}") for name in names}
    return _from_tensors(best, kept), position


def _list_tensors(state: Tuned) -> dict[str, Tensor]:
    """Return all tensors of a state by name."""
    tensors = {"gain": state.gain}
    for number, layer in enumerate(state.layers):
        for name, gain in layer.gains.items():
            tensors[f"{number}.{name}"] = gain
        for name, linear in layer.linears.items():
            for field in fields(linear):
                value = getattr(linear, field.name)
                if value is not None:
                    tensors[f"{number}.{name}.{field.name}"] = value
    return tensors


def _from_tensors(like: Tuned, tensors: Mapping[str, Tensor]) -> Tuned:
    """Return the state with these tensors, made as `like` is."""
    layers = []
    for number, layer in enumerate(like.layers):
        linears = {
            name: QuantizedLinear(
                *(tensors.get(f"{number}.{name}.{field.name}") for field in fields(linear))  # type: ignore[arg-type]
            )
            for name, linear in layer.linears.items()
        }
        layers.append(LayerState(linears, {name: tensors[f"{number}.{name}"] for name in layer.gains}))
    return Tuned(tuple(layers), tensors["gain"])
