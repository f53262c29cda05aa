"""The known figures: what the published recipes and ours cost on a trained model with massive activations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anequant.checkpoints.source import SAMPLE_TEXT, resolve_source
from anequant.pipeline.evaluate import evaluate_text
from anequant.pipeline.quantize import quantize
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe

ROTATED = {"r1": "block-hadamard", "r2": "hadamard"}
UNROTATED = {"r1": "none", "r2": "none"}


@pytest.fixture(autouse=True)
def all_threads() -> Iterator[None]:
    """Large products here: all cores, unless other tests have them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count() or 1)
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
    quality = evaluate_text(str(tmp_path / "out"), eval_text, str(qwen2_29m), windows=12, length=512)
    assert (quality.windows, quality.tokens) == (12, 12 * 511)
    assert quality.extra_nll is not None and least <= quality.extra_nll <= most


def calibrated(model: Path, output: Path, source: str, windows: int) -> None:
    recipe = load_recipe("w4-ane")
    quantize(resolve_source(str(model)), output, recipe, Calibration(source, windows, 512))


def test_error_feedback_pays(
    qwen2_29m: Path, eval_text: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """GPTQ on one codebook, calibrated on 4 windows, against rounding to the nearest entry."""
    gptq = load_recipe("w4-ane", {"descent": 0, "refinement": 0})
    source = resolve_source(str(qwen2_29m))
    quantize(source, tmp_path / "gptq", gptq, Calibration(str(calibration_text), 4, 512))
    quantize(source, tmp_path / "nearest", load_recipe("w4-nearest"))
    ours, nearest = (
        evaluate_text(str(tmp_path / name), eval_text, str(qwen2_29m), windows=8, length=512)
        for name in ("gptq", "nearest")
    )
    assert ours.kl is not None and nearest.kl is not None
    assert ours.kl < 0.9 * nearest.kl


def test_one_codebook_beats_groups_of_32() -> None:
    """By the README's measurements, which take an hour: `w4-ane` against affine groups, on 32 windows."""
    runs = json.loads((Path(__file__).parent.parent / "docs" / "quality.json").read_text())["runs"]
    ours = [run for run in runs if run["row"] == "**+ refinement: `w4-ane`**"]
    (groups,) = (run for run in runs if run["row"] == "affine int4, groups of 32")
    assert len(ours) == 3
    assert all(run["extra_nll"] < groups["extra_nll"] and run["kl"] < groups["kl"] for run in ours)


def test_the_bundled_model_survives_w4_ane(tiny_qwen2: Path, tmp_path: Path) -> None:
    calibrated(tiny_qwen2, tmp_path / "out", "self", 12)
    quality = evaluate_text(str(tmp_path / "out"), SAMPLE_TEXT, str(tiny_qwen2), windows=8, length=256)
    assert quality.extra_nll is not None and quality.extra_nll <= 0.05
