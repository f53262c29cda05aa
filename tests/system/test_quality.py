"""The known figures: what the published recipes and ours cost on a trained model with massive activations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT, resolve_source
from anequant.comparison.peers import affine_groups
from anequant.evaluation.divergence import measure_quality_against, record_reference
from anequant.evaluation.evaluate import evaluate_text, read_windows
from anequant.evaluation.quality import Quality
from anequant.pipeline.quantize import quantize
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe
from anequant.request import Request

ROTATED = {"r1": "block-hadamard", "r2": "hadamard"}
UNROTATED = {"r1": "none", "r2": "none"}


@pytest.fixture(autouse=True)
def all_threads() -> Iterator[None]:
    """Large products here: all cores, unless other tests have them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measure(qwen2_29m: Path, eval_text: Path) -> Callable[[Path], Quality]:
    """Quality against the float model, which runs once, on 32 windows of 512 tokens."""
    base = open_checkpoint(qwen2_29m)
    tokens = read_windows(base, eval_text, 32, 512)
    reference = record_reference(base, tokens)
    return lambda folder: measure_quality_against(open_checkpoint(folder), tokens, reference)


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
    measure: Callable[[Path], Quality],
    tmp_path: Path,
    recipe: str,
    overrides: dict[str, Any],
    least: float,
    most: float,
) -> None:
    quantize(Request(resolve_source(str(qwen2_29m)), load_recipe(recipe, overrides)), tmp_path / "out")
    quality = measure(tmp_path / "out")
    assert (quality.windows, quality.tokens) == (32, 32 * 511)
    assert quality.extra_nll is not None and least <= quality.extra_nll <= most


def calibrated(model: Path, output: Path, source: str, windows: int) -> None:
    recipe = load_recipe("w4-ane")
    quantize(Request(resolve_source(str(model)), recipe, Calibration((source,), windows, 512)), output)


def test_w4_ane_beats_groups_of_32(
    qwen2_29m: Path, measure: Callable[[Path], Quality], calibration_text: Path, tmp_path: Path
) -> None:
    """One codebook per tensor against what the Neural Engine cannot run fast, calibrated on 24 windows."""
    calibrated(qwen2_29m, tmp_path / "ours", str(calibration_text), 24)
    affine_groups(qwen2_29m, tmp_path / "groups", 32)
    ours, groups = measure(tmp_path / "ours"), measure(tmp_path / "groups")
    assert ours.extra_nll is not None and ours.kl is not None
    assert ours.extra_nll <= 0.018 and ours.kl <= 0.034
    assert groups.extra_nll is not None and groups.kl is not None
    assert ours.extra_nll < groups.extra_nll and ours.kl < groups.kl


def test_the_bundled_model_survives_w4_ane(tiny_qwen2: Path, tmp_path: Path) -> None:
    calibrated(tiny_qwen2, tmp_path / "out", "self", 24)
    quality = evaluate_text(str(tmp_path / "out"), SAMPLE_TEXT, str(tiny_qwen2), windows=8, length=256)
    assert quality.extra_nll is not None and quality.extra_nll <= 0.05
