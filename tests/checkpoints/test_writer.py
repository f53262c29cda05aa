from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from anequant.checkpoints.writer import CheckpointWriter, Entry, write_json
from anequant.errors import UnsupportedError

INDEX = "model.safetensors.index.json"

few = settings(max_examples=25, deadline=None)
shapes = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=6)


def some_tensors(sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """float32 first, then float16, as in a checkpoint's scales and weight."""
    generator = torch.Generator().manual_seed(1)
    tensors = {f"scale.{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}
    return tensors | {
        f"weight.{i}": torch.randn(size, generator=generator).half() for i, size in enumerate(sizes)
    }


def entries_of(tensors: dict[str, Tensor]) -> list[Entry]:
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(folder: Path, tensors: dict[str, Tensor], shard_bytes: int = 10**9, rows: int = 1000) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    with CheckpointWriter(folder, entries_of(tensors), shard_bytes=shard_bytes) as writer:
        for name, tensor in tensors.items():
            for part in tensor.split(rows):
                writer.write(name, part)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@few
@given(shapes)
def test_safetensors_reads_one_file(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]]
) -> None:
    folder, tensors = tmp_path_factory.mktemp("one"), some_tensors(sizes)
    write(folder, tensors)
    assert set(content(folder)) == {"model.safetensors"}
    assert_same(load_file(folder / "model.safetensors"), tensors)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@few
@given(shapes, st.integers(1, 300))
def test_safetensors_reads_several_shards(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], shard_bytes: int
) -> None:
    folder, tensors = tmp_path_factory.mktemp("several"), some_tensors(sizes)
    write(folder, tensors, shard_bytes)
    shards = sorted(folder.glob("*.safetensors"))
    read: dict[str, Tensor] = {}
    for shard in shards:
        part = load_file(shard)
        assert part and not set(part) & set(read)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= shard_bytes
        read |= part
    assert_same(read, tensors)
    if len(shards) == 1:
        assert not (folder / INDEX).exists()
        return
    count = len(shards)
    assert [shard.name for shard in shards] == [
        f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)
    ]
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}


@few
@given(shapes, st.integers(1, 300), st.integers(1, 4))
def test_the_same_tensors_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], shard_bytes: int, rows: int
) -> None:
    """Also when a tensor comes in several pieces."""
    folder, tensors = tmp_path_factory.mktemp("same"), some_tensors(sizes)
    write(folder / "a", tensors, shard_bytes)
    write(folder / "b", tensors, shard_bytes, rows)
    assert content(folder / "a") == content(folder / "b")


def test_a_strided_tensor_is_written_in_its_own_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    write(tmp_path, {"t": tensor})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], tensor)


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    tensors = some_tensors([(2, 3)])
    with pytest.raises(AssertionError), CheckpointWriter(tmp_path, entries_of(tensors)) as writer:
        writer.write("weight.0", tensors["weight.0"])
    with pytest.raises(AssertionError), CheckpointWriter(tmp_path, entries_of(tensors)) as writer:
        writer.write("scale.0", tensors["scale.0"].half())
    with pytest.raises(AssertionError), CheckpointWriter(tmp_path, entries_of(tensors)) as writer:
        writer.write("scale.0", tensors["scale.0"].repeat(2, 1))


def test_a_missing_tensor_is_noticed(tmp_path: Path) -> None:
    tensors = some_tensors([(2, 3)])
    with (
        pytest.raises(AssertionError, match="not every"),
        CheckpointWriter(tmp_path, entries_of(tensors)) as writer,
    ):
        writer.write("scale.0", tensors["scale.0"])


def test_a_misaligned_tensor_is_refused(tmp_path: Path) -> None:
    entries = [Entry("odd", torch.float16, (3,)), Entry("wide", torch.float32, (2,))]
    with pytest.raises(UnsupportedError, match="'wide'"), CheckpointWriter(tmp_path, entries) as writer:
        writer.write("odd", torch.zeros(3).half())


def test_json_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": {"d": "ü", "c": None}})
    write_json(tmp_path / "b.json", {"a": {"c": None, "d": "ü"}, "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "b": 1,
        "a": {"c": None, "d": "ü"},
    }
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith("}\n")
