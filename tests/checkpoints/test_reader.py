"""Damaged, contradictory and hostile model folders: the right error, which names the file or the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files import edit_json, edit_tensors
from safetensors.torch import load_file

from anequant.checkpoints.header import read_header
from anequant.checkpoints.reader import open_checkpoint, read_config
from anequant.checkpoints.source import Source
from anequant.errors import AnequantError, InputError, UnsupportedError
from anequant.pipeline.quantize import quantize
from anequant.recipe_files import load_recipe
from anequant.request import Request

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NEAREST = load_recipe("w4-nearest")


@pytest.fixture(scope="module")
def whole(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("whole") / "model", "qwen2", False, seed=7)


@pytest.fixture(scope="module")
def in_shards(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "model"
    return make_model(folder, "qwen2", False, seed=7, max_shard_size="300KB")


@pytest.fixture
def single(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "single"))


@pytest.fixture
def sharded(in_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(in_shards, tmp_path / "sharded"))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def refused(folder: Path, kind: type[AnequantError], *parts: str) -> AnequantError:
    """Opening the folder fails with this class; the message holds all parts. Quantizing leaves nothing."""
    with pytest.raises(AnequantError) as caught:
        open_checkpoint(folder)
    assert type(caught.value) is kind
    for part in parts:
        assert part in str(caught.value)
    output = folder.parent / "output"
    with pytest.raises(kind):
        quantize(Request(Source(folder, "model"), NEAREST), output)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    return caught.value


# --- what is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["single", "sharded"])
def test_reads_what_safetensors_reads(folder: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(folder)
    checkpoint = open_checkpoint(path)
    files = shards_of(path) if folder == "sharded" else [path / SINGLE]
    assert checkpoint.shards == files and (len(files) > 2) == (folder == "sharded")
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
    rows = checkpoint.read("model.embed_tokens.weight", slice(90, 200))
    assert torch.equal(rows, expected["model.embed_tokens.weight"][90:])
    layer = checkpoint.layer(2)
    assert torch.equal(layer["mlp.up_proj.weight"], expected["model.layers.2.mlp.up_proj.weight"])
    assert not checkpoint.is_quantized and checkpoint.head_name == "lm_head.weight"


def test_shards_or_one_file_give_the_same_output(whole: Path, in_shards: Path, tmp_path: Path) -> None:
    assert len(shards_of(in_shards)) > 2
    for source, output in ((whole, "from-whole"), (in_shards, "from-shards")):
        quantize(Request(Source(source, "model"), NEAREST), tmp_path / output)
    names = {path.name for path in (tmp_path / "from-whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "from-shards").iterdir()}
    for name in sorted(names - {"anequant.json"}):
        first, second = ((tmp_path / output / name).read_bytes() for output in ("from-whole", "from-shards"))
        assert first == second, name
    manifests = [
        json.loads((tmp_path / output / "anequant.json").read_text())
        for output in ("from-whole", "from-shards")
    ]
    assert manifests[0]["files"] == manifests[1]["files"]
    assert set(manifests[1]["source"]["files"]) == {
        "config.json",
        INDEX,
        *(path.name for path in shards_of(in_shards)),
    }


def test_a_symlinked_file_is_read(single: Path, tmp_path: Path) -> None:
    """The hub's cache holds links to files elsewhere."""
    (single / SINGLE).rename(tmp_path / "blob")
    (single / SINGLE).symlink_to(tmp_path / "blob")
    assert open_checkpoint(single).read("model.norm.weight").shape == (128,)


# --- damaged files ------------------------------------------------------------------------------------


def test_a_truncated_shard(sharded: Path) -> None:
    shard = shards_of(sharded)[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(sharded, InputError, shard.name, "truncated")


@pytest.mark.parametrize("size", [0, 7, 8, 200])
def test_a_file_cut_within_its_header(single: Path, size: int) -> None:
    (single / SINGLE).write_bytes((single / SINGLE).read_bytes()[:size])
    refused(single, InputError, SINGLE)


def test_trailing_bytes(single: Path) -> None:
    with (single / SINGLE).open("ab") as file:
        file.write(b"more")
    refused(single, InputError, SINGLE, "longer")


def test_a_missing_shard(sharded: Path) -> None:
    shard = shards_of(sharded)[1]
    shard.unlink()
    refused(sharded, InputError, shard.name, "missing")


def test_an_lfs_pointer(single: Path) -> None:
    (single / SINGLE).write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
    )
    error = refused(single, InputError, SINGLE, "git-lfs")
    assert error.exit_code == 3


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b"[" * 100_000, b"\xff\xfe"]
)
def test_a_header_that_is_none(single: Path, header: bytes) -> None:
    (single / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    refused(single, InputError, SINGLE)


def test_no_weights_at_all(single: Path) -> None:
    (single / SINGLE).rename(single / "pytorch_model.bin")
    refused(single, InputError, "no safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("content", ["{", "[]", '"text"', ""])
def test_a_broken_config(single: Path, content: str) -> None:
    (single / "config.json").write_text(content)
    refused(single, InputError, "config.json")


def test_a_missing_config_or_folder(single: Path, tmp_path: Path) -> None:
    (single / "config.json").unlink()
    refused(single, InputError, "config.json", "missing")
    with pytest.raises(InputError, match="does not exist"):
        read_config(tmp_path / "nowhere")


# --- the index ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "..",
        ".",
        "",
        "a/b.safetensors",
        "/etc/x.safetensors",
        "C:x.safetensors",
        "C:\\x.safetensors",
        "a\\b.safetensors",
        "..\\x.safetensors",
        "\\\\host\\share\\x.safetensors",
    ],
)
def test_an_index_that_points_outside(sharded: Path, tmp_path: Path, name: str) -> None:
    """Even where the file exists."""
    if name == "../x.safetensors":
        shutil.copyfile(shards_of(sharded)[0], tmp_path / "x.safetensors")
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit_json(sharded / INDEX, weight_map={**weight_map, "model.norm.weight": name})
    with pytest.raises(InputError, match="leaves the model folder") as caught:
        open_checkpoint(sharded)
    assert INDEX in str(caught.value)
    assert name in str(caught.value) or repr(name) in str(caught.value)


def test_an_index_that_names_another_kind_of_file(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit_json(sharded / INDEX, weight_map={**weight_map, "model.norm.weight": "config.json"})
    refused(sharded, InputError, "config.json", "safetensors")


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(path.name for path in shards_of(sharded) if path.name != weight_map["model.norm.weight"])
    edit_json(sharded / INDEX, weight_map={**weight_map, "model.norm.weight": other})
    refused(sharded, InputError, "model.norm.weight", other)


def test_tensors_in_two_shards(sharded: Path) -> None:
    """Of many, the message names the same one in every process."""
    several = max(shards_of(sharded), key=lambda path: len(read_header(path)))
    shutil.copyfile(several, sharded / "twin.safetensors")
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit_json(sharded / INDEX, weight_map={**weight_map, "more": "twin.safetensors"})
    names = sorted(read_header(several))
    assert len(names) > 4
    refused(sharded, InputError, f"'{names[0]}' is in '{several.name}' and 'twin.safetensors'")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    refused(sharded, InputError, INDEX)


# --- config against tensors ---------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", None, 3])
def test_an_unknown_architecture_lists_the_known(single: Path, model_type: Any) -> None:
    edit_json(single / "config.json", model_type=model_type)
    error = refused(single, UnsupportedError, repr(model_type), "config.json")
    assert all(known in str(error) for known in ("llama", "mistral", "qwen2", "qwen3"))


def test_a_quantized_config(single: Path) -> None:
    edit_json(single / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(single, InputError, "already quantized", "gptq", "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "128"),
        ("hidden_size", None),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 2.0),
        ("num_key_value_heads", 3),
        ("vocab_size", True),
        ("vocab_size", 2**40),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", -1.0),
        ("head_dim", 31),
    ],
)
def test_an_impossible_number(single: Path, key: str, value: Any) -> None:
    edit_json(single / "config.json", **{key: value})
    refused(single, InputError, key, "config.json")


def test_an_unknown_activation(single: Path) -> None:
    edit_json(single / "config.json", hidden_act="gelu")
    refused(single, UnsupportedError, "hidden_act", "gelu")


def test_a_wrong_shape(single: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(single, lambda tensors: tensors.update({name: torch.zeros(128, 191)}))
    refused(single, InputError, name, "[128, 191]", "[128, 192]", SINGLE)


def test_a_transposed_shape(single: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(single, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    refused(single, InputError, name, "[192, 128]")


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.v_proj.bias", "model.norm.weight", "lm_head.weight"]
)
def test_a_missing_tensor(single: Path, name: str) -> None:
    edit_tensors(single, lambda tensors: tensors.__delitem__(name))
    refused(single, InputError, name, "missing")


@pytest.mark.parametrize("layer", [3, 12])
def test_a_layer_too_many(single: Path, layer: int) -> None:
    """Loading would silently leave it out, which is another model than the one that was trained."""
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    edit_tensors(single, lambda tensors: tensors.update({name: torch.zeros(192, 128)}))
    refused(single, InputError, name, "3 layers")


def test_integers_where_floats_belong(single: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(single, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(single, InputError, name, "I8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.self_attn.k_proj.bias", "lm_head.weight"]
)
def test_a_value_that_is_not_finite(single: Path, name: str, value: float) -> None:
    """Values are only read when their turn comes; the run then stops and leaves nothing."""
    edit_tensors(single, lambda tensors: tensors[name].view(-1)[5].fill_(value))
    checkpoint = open_checkpoint(single)
    with pytest.raises(InputError, match="not finite") as caught:
        checkpoint.read(name)
    assert name in str(caught.value) and SINGLE in str(caught.value) and "1 values" in str(caught.value)
    with pytest.raises(InputError, match="not finite"):
        quantize(Request(Source(single, "model"), NEAREST), single.parent / "output")
    assert [path.name for path in single.parent.iterdir()] == ["single"]
