"""The known figures: what the published recipes and ours cost on a trained model with massive activations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anequant.checkpoints.source import resolve_source
from anequant.pipeline.evaluate import evaluate_text
from anequant.pipeline.quantize import quantize
from anequant.recipe import load_recipe

ROTATED = {"r1": "block-hadamard", "r2": "hadamard"}
UNROTATED = {"r1": "none", "r2": "none"}


@pytest.fixture(autouse=True)
def all_threads() -> Iterator[None]:
    """Large products here; the rest of the tests runs on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("recipe", "overrides", "least", "most"),
    [
        ("w_int8_per_tensor", UNROTATED, -0.002, 0.002),
        ("w_int4_per_tensor", ROTATED, 0.10, 0.22),
        ("w_int4_per_tensor", UNROTATED, 0.28, 1.0),
        ("w4-nearest", {}, 0.0, 0.035),
        ("w4-nearest", {"r1": "hadamard"}, 0.0, 0.035),
    ],
    ids=["int8", "int4-rotated", "int4", "lut-balanced", "lut-balanced-full-width"],
)
def test_extra_nll_of_qwen2_29m(
    qwen2_29m: Path,
    eval_text: Path,
    tmp_path: Path,
    recipe: str,
    overrides: dict[str, Any],
    least: float,
    most: float,
) -> None:
    quantize(resolve_source(str(qwen2_29m)), tmp_path / "out", load_recipe(recipe, overrides))
    quality = evaluate_text(str(tmp_path / "out"), eval_text, str(qwen2_29m), windows=32, length=512)
    assert (quality.windows, quality.tokens) == (32, 32 * 511)
    assert quality.extra_nll is not None and least <= quality.extra_nll <= most
