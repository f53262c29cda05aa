"""`anequant diff` of assets of Core AI: against how the checkpoints differ that they were made from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Quantized
from running import invoke

from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import open_checkpoint
from anequant.errors import UnsupportedError, UsageError
from anequant.inspection import diff_assets
from anequant.inspection.diff_paths import diff
from anequant.lower_options import AssetOptions
from anequant.pipeline.lower import lower
from anequant.request import LowerRequest
from anequant.targets.coreai.assemble import PROGRAM
from anequant.targets.coreai.bundle import find_asset
from anequant.targets.coreai.installed import find_problem
from anequant.targets.coreai.stored import StoredAsset

problem = find_problem()
pytestmark = pytest.mark.skipif(problem is not None, reason=problem.what if problem else "")

DOWN = "model.layers.0.mlp.down_proj"
Lowered = tuple[Path, Quantized]


@pytest.fixture(scope="module")
def four_bits(
    tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path, quantize_model: Callable[..., Quantized]
) -> Lowered:
    quantized = quantize_model(tiny_qwen2, "w4-nearest")
    folder = tmp_path_factory.mktemp("one") / "bundle"
    lower(LowerRequest(quantized.folder, AssetOptions(256, (8,))), folder)
    return folder, quantized


@pytest.fixture(scope="module")
def other_tables(
    tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path, quantize_model: Callable[..., Quantized]
) -> Lowered:
    quantized = quantize_model(tiny_qwen2, "w4-nearest", seed=1)
    folder = tmp_path_factory.mktemp("other") / "bundle"
    lower(LowerRequest(quantized.folder, AssetOptions(512, (8,))), folder)
    return folder, quantized


def test_an_asset_is_its_own_copy(four_bits: Lowered, tmp_path: Path) -> None:
    folder, _ = four_bits
    shutil.copytree(folder, tmp_path / "copy")
    found = diff(folder, tmp_path / "copy")
    assert found.same and found.packages[0].constants.equal > 50
    assert invoke("diff", find_asset(folder), find_asset(tmp_path / "copy")).exit_code == 0


def test_constants_and_functions_that_differ(four_bits: Lowered, other_tables: Lowered) -> None:
    (one, ours), (other, theirs) = four_bits, other_tables
    (found,) = diff(one, other).packages
    assert set(found.only_b) == {"extend_512_8", "prompt_opt_512_8"} and found.only_a == ()
    assert found.metadata["language"][1]["max_context_length"] == 512
    linears = [
        load(DOWN, checkpoint.read, checkpoint.tensors)
        for checkpoint in map(open_checkpoint, (ours.folder, theirs.folder))
    ]
    changed = {value.name: value for value in found.constants.values}
    codes = [linear.codes.numpy() for linear in linears]
    assert changed[f"{DOWN}.codes"].codes == int(np.count_nonzero(codes[0] != codes[1])) > 0
    dense = [linear.codebook.double()[linear.codes.long()] for linear in linears]
    error = float((dense[0] - dense[1]).norm() / dense[0].norm())
    assert changed[f"{DOWN}.codes"].relative_error == pytest.approx(error, rel=1e-2)
    assert not any(name.endswith(".codebook") for name in changed)
    rotary = {form.name for form in found.constants.forms}
    assert rotary == {"rope.cos", "rope.sin"}


def test_one_scale_that_was_changed_is_found(four_bits: Lowered, tmp_path: Path) -> None:
    folder, _ = four_bits
    shutil.copytree(folder, tmp_path / "copy")
    program = find_asset(tmp_path / "copy") / PROGRAM
    blob = StoredAsset(program.parent).blobs[f"{DOWN}.output_scale"]
    data = bytearray(program.read_bytes())
    data[blob.start : blob.start + 2] = np.float16(3).tobytes()
    program.write_bytes(data)
    (found,) = diff(folder, tmp_path / "copy").packages
    assert [value.name for value in found.constants.values] == [f"{DOWN}.output_scale"]
    result = invoke("diff", folder, tmp_path / "copy")
    assert result.exit_code == 1 and f"{DOWN}.output_scale" in result.stdout


def test_what_is_not_compared_is_refused_by_name(four_bits: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, quantized = four_bits
    with pytest.raises(UsageError, match="is a bundle of Core AI"):
        diff(folder, quantized.folder)
    with pytest.raises(UsageError, match="logits are compared of checkpoints and packages"):
        diff(folder, folder, compare_logits=True)

    def refuse(asset: Path) -> Any:
        raise UnsupportedError("coreai-core is not installed")

    monkeypatch.setattr(diff_assets, "read_listing", refuse)
    with pytest.raises(UnsupportedError, match="coreai-core is not installed"):
        diff(folder, folder)
