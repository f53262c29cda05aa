"""Same input, same recipe, same version: same bytes (design.md, guarantee 3)."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from files import Contents, contents, differing
from running import SCRIPT, succeed

from anequant.checkpoints.header import read_header

REPORTS = {"report.html", "report.json"}
"""They hold times and memory, so the promise does not cover them."""

SIZES = ("--context", "32", "--batch", "16")
FEW_TOKENS = ("--calib-samples", "4", "--calib-length", "64")
HERE = {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
THERE = {"PYTHONHASHSEED": "2", "TZ": "America/New_York", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
"""Sums of calibration depend on how many threads share them, so both have one."""


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`anequant convert` of the bundled model by two processes at once that share nothing but the code."""
    runs, folders = [], []
    for environment, umask in ((HERE, 0o022), (THERE, 0o077)):
        home = tmp_path_factory.mktemp(environment["PYTHONHASHSEED"])
        runs.append(
            subprocess.Popen(
                [SCRIPT, "convert", "-o", "out", "--quiet", *SIZES, *FEW_TOKENS],
                cwd=home,
                umask=umask,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        folders.append(home / "out")
    for run in runs:
        output, _ = run.communicate(timeout=300)
        assert (run.returncode, output) == (0, "")
    return folders[0], folders[1]


def quantized(folder: Path, model: Path, *options: str) -> Contents:
    succeed("quantize", model, "-o", folder, "--quiet", *FEW_TOKENS, *options)
    return contents(folder)


def test_two_conversions_are_byte_identical(twice: tuple[Path, Path]) -> None:
    one, other = contents(twice[0]), contents(twice[1])
    assert {"anequant.json", "checkpoint/model.safetensors", "packages/meta.yaml"} <= one.keys()
    assert sum(name.endswith("weight.bin") for name in one) == 3
    assert REPORTS.issuperset(differing(one, other))
    assert one.keys() >= REPORTS


def test_reports_of_two_conversions_differ_in_time_and_memory_only(twice: tuple[Path, Path]) -> None:
    one, other = (json.loads((folder / "report.json").read_text()) for folder in twice)
    assert one.pop("run").keys() == other.pop("run").keys() == {"seconds", "steps", "peak_memory_bytes"}
    assert one == other


def test_the_umask_alone_tells_who_may_read(twice: tuple[Path, Path]) -> None:
    for folder, mask in zip(twice, (0o022, 0o077), strict=True):
        for path in (folder, *folder.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_quantize_alone_writes_the_checkpoint_that_convert_writes(
    twice: tuple[Path, Path], tiny_qwen2: Path, tmp_path: Path
) -> None:
    ours = quantized(tmp_path / "checkpoint", tiny_qwen2)
    assert differing(ours, contents(twice[0] / "checkpoint")) == []


def test_another_seed_gives_other_bytes(twice: tuple[Path, Path], tiny_qwen2: Path, tmp_path: Path) -> None:
    other = quantized(tmp_path / "checkpoint", tiny_qwen2, "--seed", "1")
    changed = differing(other, contents(twice[0] / "checkpoint"))
    assert set(changed) == {"model.safetensors", "anequant.json", "quantization_config.json", "README.md"}


def test_without_calibration_the_number_of_threads_does_not_matter(tiny_qwen2: Path, tmp_path: Path) -> None:
    one = quantized(tmp_path / "one", tiny_qwen2, "--recipe", "w4-nearest")
    torch.set_num_threads(2)
    try:
        two = quantized(tmp_path / "two", tiny_qwen2, "--recipe", "w4-nearest")
    finally:
        torch.set_num_threads(1)
    assert differing(one, two) == []


def test_calibration_records_the_number_of_threads(twice: tuple[Path, Path]) -> None:
    manifest = json.loads((twice[0] / "checkpoint" / "anequant.json").read_text())
    assert manifest["calibration"]["threads"] == 1


def test_threads_change_what_calibration_measures_and_nothing_else(
    twice: tuple[Path, Path], tiny_qwen2: Path, tmp_path: Path
) -> None:
    """Sums over tokens round differently: weights, and numbers that tell of them. No shape, no setting."""
    torch.set_num_threads(2)
    try:
        two = quantized(tmp_path / "two", tiny_qwen2)
    finally:
        torch.set_num_threads(1)
    one = contents(twice[0] / "checkpoint")
    measured = {"model.safetensors", "anequant.json", "quantization_config.json", "README.md"}
    assert measured.issuperset(differing(one, two))
    headers = [
        read_header(folder / "model.safetensors") for folder in (twice[0] / "checkpoint", tmp_path / "two")
    ]
    shapes = [{name: (info.dtype, info.shape) for name, info in header.items()} for header in headers]
    assert shapes[0] == shapes[1]
