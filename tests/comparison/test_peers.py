"""Other people's rounding: against plain versions, a group after the other, and what is counted of it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import BUNDLED_MODEL
from anequant.comparison.peers import (
    GROUPS,
    PEERS,
    Peer,
    affine_groups,
    coremltools_kmeans,
    coremltools_scaled_kmeans,
    projection_bits,
)

ZERO_BITS = {"affine int4": 4, "torchao int4": 8, "HQQ int4": 16}
"""A code, an int8 and a float16."""

ROW = "model.layers.0.self_attn.q_proj.weight"


def find(name: str) -> Peer:
    (peer,) = (peer for peer in PEERS if peer.name == name)
    return peer


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def round_group(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round a group to the 16 multiples of a step from its least value, or zero, to its largest."""
    low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
    step = np.float32(np.float16((high - low) / np.float32(15)))
    if step == 0:
        return np.zeros_like(values)
    zero = np.round(-low / step)
    rounded = [(min(max(np.round(value / step + zero), 0), 15) - zero) * step for value in values]
    return np.array(rounded, dtype=np.float32)


@pytest.mark.parametrize("size", GROUPS)
def test_affine_groups_are_those_of_a_plain_version(size: int, tmp_path: Path) -> None:
    find(f"affine int4, groups of {size}").run(BUNDLED_MODEL, tmp_path / "out")
    before, after = load_weights(BUNDLED_MODEL)[ROW].numpy(), load_weights(tmp_path / "out")[ROW].numpy()
    for row in range(0, len(before), 7):
        for start in range(0, before.shape[1], size):
            group = slice(start, start + size)
            assert np.array_equal(after[row, group], round_group(before[row, group])), (row, start)


def test_groups_of_nothing_of_one_sign_and_of_hardly_anything(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[ROW][0], tensors[ROW][1], tensors[ROW][2, :32] = 0, tensors[ROW][1].abs() + 1, 1e-9
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    affine_groups(tmp_path / "model", tmp_path / "out", 32)
    before, after = (load_weights(tmp_path / name)[ROW].numpy() for name in ("model", "out"))
    assert np.isfinite(after).all() and not after[0].any() and not after[2, :32].any()
    for start in range(0, before.shape[1], 32):
        group = slice(start, start + 32)
        assert np.array_equal(after[1, group], round_group(before[1, group]))


@pytest.mark.parametrize("shape", [(3, 192), (5, 100), (1, 1)])
def test_bits_of_groups_are_counted_group_by_group(shape: tuple[int, int]) -> None:
    rows, columns = shape
    for name, zero in ZERO_BITS.items():
        for size in GROUPS:
            counted = sum(16 + zero for _ in range(rows) for _ in range(0, columns, size))
            assert find(f"{name}, groups of {size}").extra(*shape) == counted


def test_bits_of_a_model() -> None:
    spec = open_checkpoint(BUNDLED_MODEL).spec
    weights = spec.num_layers * spec.layer_weights
    bits = {peer.name: projection_bits(peer, spec) / weights for peer in PEERS if "groups" in peer.name}
    assert bits == {
        "affine int4, groups of 32": 4.625,
        "affine int4, groups of 64": 4.3125,
        "torchao int4, groups of 32": 4.75,
        "torchao int4, groups of 64": 4.375,
        "HQQ int4, groups of 32": 5.0,
        "HQQ int4, groups of 64": 4.5,
    }
    plain = projection_bits(find("coremltools k-means"), spec)
    assert plain == 4 * weights + 7 * spec.num_layers * 16 * 16
    assert not any(peer.on_ane for peer in PEERS if "groups" in peer.name)


@pytest.mark.parametrize(
    "peer", [coremltools_kmeans, coremltools_scaled_kmeans, partial(affine_groups, size=32)]
)
def test_peers_round_the_projections_and_nothing_else(peer: Any, tmp_path: Path) -> None:
    peer(BUNDLED_MODEL, tmp_path / "out")
    before, after = load_weights(BUNDLED_MODEL), load_weights(tmp_path / "out")
    assert before.keys() == after.keys() and (tmp_path / "out" / "tokenizer.json").is_file()
    for name, weight in after.items():
        if "_proj.weight" not in name:
            assert torch.equal(weight, before[name]), name
            continue
        off = float((weight - before[name]).norm() / before[name].norm())
        assert 0.01 < off < 0.25, (name, off)
        if peer is coremltools_kmeans:
            assert len(weight.unique()) <= 16
        elif peer is coremltools_scaled_kmeans:
            assert len(weight.unique()) > 16 and max(len(row.unique()) for row in weight) <= 16
        else:
            assert max(len(group.unique()) for group in weight.view(-1, 32)) <= 16


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize(("name", "package"), [("torchao int4", "torchao"), ("HQQ int4", "hqq")])
def test_a_group_of_a_package_holds_what_is_counted(
    name: str, package: str, size: int, tmp_path: Path
) -> None:
    """16 values, evenly spaced by a scale of float16."""
    pytest.importorskip(package, reason=f"needs {package}, of the extra peers")
    find(f"{name}, groups of {size}").run(BUNDLED_MODEL, tmp_path / "out")
    before, after = load_weights(BUNDLED_MODEL)[ROW], load_weights(tmp_path / "out")[ROW]
    assert float((after - before).norm() / before.norm()) < 0.15
    for group in after.view(-1, size)[::11]:
        values = group.unique().double()
        assert 2 < len(values) <= 16
        steps = (values - values[0]) / values.diff().min()
        assert torch.allclose(steps, steps.round(), atol=2e-3) and steps.max() < 15.5
        scale = (values[-1] - values[0]) / steps[-1].round()
        assert abs(float(scale.half()) / float(scale) - 1) < 1e-5
