"""A tiny sound model to damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from anequant.cli import main
from anequant.reference.windows import load_tokenizer
from attacks.damage import parts, write


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return make_model(tmp_path_factory.mktemp("sound") / "model", "qwen2", False, **sizes)


@pytest.fixture(scope="session", autouse=True)
def warm(sound: Path, tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Imports count for no case."""
    load_tokenizer(tiny_qwen2)
    output = tmp_path_factory.mktemp("warm") / "out"
    result = CliRunner().invoke(main, ["quantize", str(sound), "-o", str(output), "--recipe", "w4-nearest"])
    assert result.exit_code == 0, result.output


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """A copy in one file."""
    return Path(shutil.copytree(sound, tmp_path / "place" / "model"))


@pytest.fixture
def in_two(model: Path) -> Path:
    """A copy in two shards and an index."""
    tensors, data = parts(model / "model.safetensors")
    weight_map = {}
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2])):
        shard = f"model-{number + 1:05d}-of-00002.safetensors"
        write(model / shard, {name: tensors[name] for name in some}, data)
        weight_map |= dict.fromkeys(some, shard)
    (model / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model
