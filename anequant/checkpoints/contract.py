"""ANEMLL's per-tensor (SP) contract: what a checkpoint must hold for its loader to rebuild the weights.

For each of the seven projections P of every layer

    P.weight         [out, in]   input_scale * codebook entry * output_scale, as stock transformers reads it
    P.input_scales   [1, in]     finite and not zero, also in float16
    P.output_scales  [out, 1]    the same; may be negative
    P.codebook       any shape   2 to 256 finite entries; without it the loader does not snap
    P.bias           [out]       the effective bias, zeros where there is none; bias / output_scale in float16

The loader works in float16 throughout, and so do these checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anequant.checkpoints.foreign import complete_codebook, find_codebook
from anequant.checkpoints.layout import list_projections
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.errors import InputError, VerificationError

RELATIVE_STEP = 2.0**-7
"""A bfloat16 weight is off by up to 2**-9 of itself, and its divisor rounds twice in float16."""

ABSOLUTE_STEP = 2.0**-24
"""The distance of the smallest float16 numbers."""

ROWS = 1024


@dataclass(frozen=True)
class Violation:
    """A tensor and the rule it breaks."""

    tensor: str
    rule: str

    def __str__(self) -> str:
        return f"'{self.tensor}' {self.rule}"


def require_contract(folder: Path) -> int:
    """Return the number of projections that keep the contract: all of them.

    Raises VerificationError with the first violation and their count, and what `check_contract` raises.
    """
    violations = check_contract(folder)
    if violations:
        more = f" and {len(violations) - 1} more violations" if len(violations) > 1 else ""
        raise VerificationError(
            f"the per-tensor contract is broken: {violations[0]}{more}",
            where=str(folder),
            remedy="quantize the model again",
        )
    return len(list_projections(open_checkpoint(folder).spec))


def check_contract(folder: Path) -> list[Violation]:
    """Return every violation in a checkpoint folder, in file order.

    Raises InputError, naming the tensor, for a folder that stock transformers could not read either.
    """
    checkpoint = open_checkpoint(folder)
    return [
        violation
        for name in list_projections(checkpoint.spec)
        for violation in _check_projection(checkpoint, name)
    ]


def _check_projection(checkpoint: Checkpoint, name: str) -> list[Violation]:
    rows, columns = checkpoint.tensors[f"{name}.weight"].shape
    shapes = {"input_scales": (1, columns), "output_scales": (rows, 1), "bias": (rows,)}
    violations = []
    for suffix, shape in shapes.items():
        info = checkpoint.tensors.get(f"{name}.{suffix}")
        if info is None:
            violations.append(Violation(f"{name}.{suffix}", "is missing"))
        elif info.shape != shape:
            found = f"has shape {list(info.shape)}, it must be {list(shape)}"
            violations.append(Violation(f"{name}.{suffix}", found))
    if violations:
        return violations
    try:
        parts = {suffix: checkpoint.read(f"{name}.{suffix}").half() for suffix in (*shapes, "weight")}
        codebook = None
        if f"{name}.codebook" in checkpoint.tensors:
            codebook = checkpoint.read(f"{name}.codebook").half().reshape(-1)
    except InputError as error:
        return [Violation(name, f"cannot be read: {error.what}")]
    for suffix in ("input_scales", "output_scales"):
        if not _all_usable(parts[suffix]):
            rule = "holds zeros or infinities in float16, and nothing divides by those"
            violations.append(Violation(f"{name}.{suffix}", rule))
    if violations:
        return violations
    if not bool(torch.isfinite(parts["bias"] / parts["output_scales"].reshape(-1)).all()):
        violations.append(Violation(f"{name}.bias", "divided by the output scale leaves float16"))
    return violations + _check_weight(name, parts, codebook)


def _check_weight(name: str, parts: Mapping[str, Tensor], codebook: Tensor | None) -> list[Violation]:
    """Return the violations of a weight that, divided by both scales, is off the codebook, or without one
    takes too many levels."""
    weight, input_scales, output_scales = parts["weight"], parts["input_scales"], parts["output_scales"]
    smallest = float(output_scales.abs().min() * input_scales.abs().min())
    largest = float(output_scales.abs().max() * input_scales.abs().max())
    if not 0 < smallest <= largest < torch.inf:
        return [Violation(f"{name}.output_scales", "times the input scales leaves float16")]
    try:
        if codebook is None:
            find_codebook(name, weight, input_scales, output_scales)
            return []
        complete_codebook(name, codebook)
    except InputError as error:
        return [Violation(name, f"is not palettized: {error.what}")]
    levels = torch.empty(0)
    for start in range(0, weight.shape[0], ROWS):
        core = weight[start : start + ROWS] / (input_scales * output_scales[start : start + ROWS])
        levels = torch.unique(torch.cat([levels, torch.unique(core.float())]))
    entries = torch.unique(codebook.float())
    places = torch.searchsorted(entries, levels).clamp(1, len(entries) - 1)
    distance = torch.minimum((levels - entries[places - 1]).abs(), (levels - entries[places]).abs())
    excess = distance - RELATIVE_STEP * levels.abs() - ABSOLUTE_STEP / smallest
    if float(excess.max()) > 0:
        value = float(levels[int(excess.argmax())])
        rule = f"divided by its scales holds {value:.4g}, which is no entry of the codebook"
        return [Violation(f"{name}.weight", rule)]
    return []


def _all_usable(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all()) and bool((values != 0).all())
