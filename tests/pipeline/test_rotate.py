"""`anequant rotate`: an ordinary checkpoint with the model's logits, and one of two steps that equal one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Ran, invoke, succeed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.rotation_files import ROTATIONS
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.reference.forward import logits

SUCCESS, USAGE, INPUT = 0, 2, 3
CALIBRATION = ("--calib", SAMPLE_TEXT, "--calib-samples", 4, "--calib-length", 32)
QUICK = ("--descent", 1, "--refinement", 0)


def report(*args: object) -> dict[str, Any]:
    return succeed(*args, "--json").printed


def refused(result: Ran, code: int, *words: str) -> None:
    assert result.exit_code == code, result.stderr
    first = result.stderr.splitlines()[0]
    assert first.startswith("error: ") and all(word in first for word in words), first


@pytest.fixture(scope="module")
def rotated(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rotated") / "out"
    values = report("rotate", tiny_qwen2, "-o", folder)
    assert values["equivalence"] <= 1e-5 and values["rotations"] is None
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_stock_transformers_gives_the_models_logits(
    make_model: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    source = make_model(tmp_path / "model", model_type, True)
    folder = tmp_path / "out"
    report("rotate", source, "-o", folder, "--r1", "hadamard", "--seed", 7)
    tokens = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(1))
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval().double() for path in (source, folder)
    ]
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32
    with torch.no_grad():
        theirs, ours = (model(tokens, use_cache=False).logits for model in models)
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    stored = load_file(folder / "model.safetensors")
    before = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert float((stored[name] - before[name]).abs().max()) > 0.01, "it is not turned"
    assert torch.equal(stored["model.norm.weight"], torch.ones(128))


def test_with_online_rotations_the_weights_are_not_stocks(tiny_qwen2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    report("rotate", tiny_qwen2, "-o", folder, "--r3", "hadamard", "--r4", "block-hadamard")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["r4"] == "block-hadamard" and config["dtype"] == "float32"
    assert [path.name for path in folder.glob("*.safetensors")] == ["anequant.safetensors"]
    tokens = torch.arange(20, 44)[None]
    theirs, ours = (next(logits(open_checkpoint(path), tokens)) for path in (tiny_qwen2, folder))
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


def test_what_rotate_writes_about_itself(rotated: Path) -> None:
    written = json.loads((rotated / "anequant.json").read_text(encoding="utf-8"))
    assert written["kind"] == "rotated"
    words = {"r1": "block-hadamard", "r2": "hadamard", "r3": "none", "r4": "none"}
    numbers = {"r1_block": 64, "r4_block": 64, "seed": 0, "restarts": 1, "learn": 0}
    assert written["recipe"] == {**words, **numbers}
    files = {path.name for path in rotated.iterdir()}
    assert files - {"anequant.json"} == set(written["files"])
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= files
    assert report("verify", rotated)["checkpoint"] == {"tensors": 0}


@pytest.mark.parametrize(
    ("rotation", "rest"),
    [
        ((), QUICK),
        (
            ("--r1", "hadamard", "--r3", "hadamard", "--r4", "block-hadamard"),
            ("--activation-bits", 8, *QUICK),
        ),
        (("--r1", "pca", *CALIBRATION), ("--recipe", "w4-nearest", "--fold-input-scales")),
        (("--restarts", 2, "--recipe", "w4-nearest", *CALIBRATION), ("--recipe", "w4-nearest")),
    ],
    ids=["gptq", "online", "pca", "restarts"],
)
def test_two_steps_equal_one(
    tiny_qwen2: Path, tmp_path: Path, rotation: tuple[object, ...], rest: tuple[object, ...]
) -> None:
    """Bit for bit: the weights, the config, and the rotations beside them."""
    between, two, one = (tmp_path / name for name in ("between", "two", "one"))
    report("rotate", tiny_qwen2, "-o", between, *rotation)
    twice = report("quantize", between, "-o", two, *rest, *CALIBRATION)
    calibration = () if CALIBRATION[0] in rotation else CALIBRATION
    once = report("quantize", tiny_qwen2, "-o", one, *rotation, *rest, *calibration)
    assert twice["rotated_before"] and not once["rotated_before"]
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in two.iterdir()}
    for name in names - {"anequant.json", "quantization_config.json", "README.md"}:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    recipes = [
        json.loads((path / "anequant.json").read_text(encoding="utf-8"))["recipe"] for path in (one, two)
    ]
    assert recipes[0] == recipes[1]
    assert (ROTATIONS in names) == ("--restarts" in rotation or "pca" in rotation)


def test_rotated_models_calibrate_on_themselves(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling runs R3 and R4 as well: the same text as the original's own, in float32."""
    monkeypatch.setattr("anequant.calibration.sample.choose_dtype", lambda checkpoint: torch.float32)
    between = tmp_path / "between"
    report("rotate", tiny_qwen2, "-o", between, "--r3", "hadamard", "--r4", "block-hadamard")
    few = ("--calib-samples", 2, "--calib-length", 16, *QUICK)
    digests = []
    for source, name, own in ((between, "two", ()), (tiny_qwen2, "one", ("--r4", "block-hadamard"))):
        report("quantize", source, "-o", tmp_path / name, *few, *own)
        written = json.loads((tmp_path / name / "anequant.json").read_text(encoding="utf-8"))
        digests.append(written["calibration"]["tokens_sha256"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("option", "key"),
    [
        (("--r1", "hadamard"), "'r1'"),
        (("--r2", "none"), "'r2'"),
        (("--r4", "hadamard"), "'r4'"),
        (("--seed", 1), "'seed'"),
        (("--learn", 2), "'learn'"),
    ],
)
def test_another_rotation_is_refused(
    rotated: Path, tmp_path: Path, option: tuple[object, ...], key: str
) -> None:
    refused(invoke("quantize", rotated, "-o", tmp_path / "out", *option, *CALIBRATION), USAGE, key, "rotated")
    assert list(tmp_path.iterdir()) == []


def test_the_same_rotation_may_be_said_again(rotated: Path, tmp_path: Path) -> None:
    same = ("--r1", "block-hadamard", "--seed", 0, "--recipe", "w4-nearest")
    assert report("quantize", rotated, "-o", tmp_path / "out", *same)["rotated_before"]


def test_rotating_again_or_what_is_quantized_is_refused(rotated: Path, tmp_path: Path) -> None:
    refused(invoke("rotate", rotated, "-o", tmp_path / "out"), INPUT, "already rotated")
    file = ("--r1", "file", "--rotations", "some.safetensors")
    refused(invoke("quantize", rotated, "-o", tmp_path / "out", *file), USAGE, "rotated already")
    assert list(tmp_path.iterdir()) == []
    made = tmp_path / "quantized"
    report("quantize", rotated, "-o", made, "--recipe", "w4-nearest")
    for command in ("rotate", "quantize"):
        refused(invoke(command, made, "-o", tmp_path / "out"), INPUT, "already quantized")
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]
    float16 = tmp_path / "float16"
    report("quantize", rotated, "-o", float16, "--bits", 16)
    refused(invoke("quantize", float16, "-o", tmp_path / "out"), INPUT, "already quantized")


def test_a_config_that_runs_something_else(tiny_qwen2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rotated"
    report("rotate", tiny_qwen2, "-o", folder, "--r4", "block-hadamard")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["r4_block"] = 32
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(invoke("quantize", folder, "-o", tmp_path / "out", "--recipe", "w4-nearest"), INPUT, "r4")


def test_rotate_takes_the_keys_of_rotations_only(tiny_qwen2: Path, tmp_path: Path) -> None:
    result = invoke("rotate", tiny_qwen2, "-o", tmp_path / "out", "--bits", 8)
    assert result.exit_code == USAGE and "--bits" in result.stderr
    shown = invoke("rotate", "--help").stdout
    assert all(option in shown for option in ("--r4-block", "--learn", "--rotations", "--calib", "--force"))
    folder = tmp_path / "out"
    folder.mkdir()
    refused(invoke("rotate", tiny_qwen2, "-o", folder), USAGE, "exists")
    report("rotate", tiny_qwen2, "-o", folder, "--force")
    shutil.rmtree(folder)
