"""Calibration tokens that are none, too few, or teach nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import assert_refused, parts, raw
from running import invoke, succeed

from anequant.errors import InputError, UsageError

pytestmark = pytest.mark.usefixtures("warm")

BAD, USAGE = InputError.exit_code, UsageError.exit_code
LENGTH = 16
ROW = list(range(LENGTH))
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

CASES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": ("", ("is not JSON",)),
    "not json": ("[[1, 2", ("is not JSON",)),
    "deep": ("[" * 100_000, ("is not JSON", "nested too deeply")),
    "not utf-8": (b"\xff[[1]]", ("cannot be read",)),
    "no list": ('{"tokens": []}', ("no list of input_ids",)),
    "a number": ("3", ("no list of input_ids",)),
    "a key twice": ('{"input_ids": [], "input_ids": []}', ("appears twice",)),
    "no entry": ("[]", ("no entry of", f"has {LENGTH} tokens")),
    "flat": (json.dumps(ROW), ("entry 0 of", "no list of token ids")),
    "deeper": (json.dumps([[ROW]]), ("entry 0 of", "no list of token ids")),
    "words": (json.dumps([["a"] * LENGTH]), ("entry 0 of", "no list of token ids")),
    "floats": (json.dumps([[1.0] * LENGTH]), ("entry 0 of", "no list of token ids")),
    "bools": (json.dumps([[True] * LENGTH]), ("entry 0 of", "no list of token ids")),
    "negative": (json.dumps([ROW, [-1, *ROW[1:]]]), ("entry 1 of", "no list of token ids")),
    "outside the vocabulary": (json.dumps([ROW, [97, *ROW[1:]]]), ("entry 1 of", "below 97")),
    "2**63": (json.dumps([[2**63] * LENGTH]), ("entry 0 of", "below 97")),
    "null": ("[null]", ("entry 0 of", "no list of token ids")),
    "objects without ids": ('[{"tokens": [1]}]', ("entry 0 of", "no list of token ids", "keys 'tokens'")),
    "a mask with holes": (
        json.dumps([{"input_ids": ROW, "attention_mask": [1, 0] * (LENGTH // 2)}]),
        ("attention_mask of entry 0 of", "a row of its own"),
    ),
    "a mask of another length": (
        json.dumps([{"input_ids": ROW, "attention_mask": [1]}]),
        ("attention_mask of entry 0 of", f"no list of {LENGTH} zeros and ones"),
    ),
    "padding that is masked": (
        json.dumps([{"input_ids": ROW, "attention_mask": [0] + [1] * (LENGTH - 1)}]),
        ("no entry of", "lower --calib-length"),
    ),
    "too short": (json.dumps([ROW[:-1]] * 3), ("no entry of", "lower --calib-length")),
    "all padding": (json.dumps([[0] * LENGTH] * 3), ("repeats a single token", "leave out the padding")),
    "all padding but the start": (json.dumps([[5] + [0] * (LENGTH - 1)]), ("repeats a single token",)),
}


def arguments(model: Path, source: Any) -> list[Any]:
    sizes = ["--calib-length", LENGTH, "--calib-samples", 4]
    return ["quantize", model, "-o", model.parent / "out", "--calib", source, *sizes]


@pytest.mark.parametrize("case", CASES)
def test_wrong_token_ids_are_refused(model: Path, case: str) -> None:
    content, words = CASES[case]
    file = model.parent / "ids.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(model.parent, arguments(model, file), USAGE, "ids.json", *words)


@pytest.mark.parametrize(
    "name", ["gone.json", "gone.JSONL", "pipe.json", "/dev", "/dev/zero", "gone.txt", "a" * 300, "a\x1b[2Jb"]
)
def test_a_source_that_is_no_file(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    os.mkfifo(model.parent / "pipe.json")
    shutil.copyfile("/dev/null", model / "tokenizer.json")
    assert_refused(model.parent, arguments(model, name), USAGE, repr(name)[1:-1])


def test_a_text_without_a_tokenizer(model: Path) -> None:
    (model.parent / "text.txt").write_text("In the morning")
    words = ("has no tokenizer to read", "calibrate on token ids")
    assert_refused(model.parent, arguments(model, model.parent / "text.txt"), BAD, *words)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 50_000, b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer(model: Path, content: bytes) -> None:
    (model / "tokenizer.json").write_bytes(content)
    (model.parent / "text.txt").write_text("In the morning")
    words = (f"the tokenizer of '{model}' cannot be read",)
    assert_refused(model.parent, arguments(model, model.parent / "text.txt"), BAD, *words)


def test_a_pipe_as_tokenizer_config(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    os.mkfifo(model / "tokenizer_config.json")
    (model.parent / "text.txt").write_text("In the morning")
    words = ("'tokenizer_config.json' is not a regular file",)
    assert_refused(model.parent, arguments(model, model.parent / "text.txt"), BAD, *words)


def test_a_tokenizer_of_another_model(model: Path, tiny_qwen2: Path) -> None:
    """It knows more tokens than the embedding has rows."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_qwen2 / name, model / name)
    (model.parent / "text.txt").write_text("In the morning they went down to the harbour. " * 20)
    file = model.parent / "text.txt"
    arguments = ["quantize", model, "-o", model.parent / "out", "--calib", file, "--calib-length", 16]
    result = invoke(*arguments)
    assert result.exit_code == BAD and not (model.parent / "out").exists()
    assert re.search(r"token \d+, the (model knows|vocabulary has) 97", result.stderr), result.stderr


@pytest.mark.parametrize("text", [b"", b"one", b"\xff\xfe"])
def test_a_text_that_holds_no_window(model: Path, tiny_qwen2: Path, text: bytes) -> None:
    (model.parent / "text.txt").write_bytes(text)
    sizes = ["--calib-length", 512]
    assert_refused(
        model.parent,
        ["quantize", tiny_qwen2, "-o", model.parent / "out", "--calib", model.parent / "text.txt", *sizes],
        USAGE,
        "text",
    )


def test_one_sample_leaves_a_singular_hessian_and_is_used(model: Path) -> None:
    """16 tokens for 64 inputs: what damping was chosen is told for every tensor."""
    file = model.parent / "ids.json"
    file.write_text(json.dumps([ROW]))
    report = quantized(model, file)
    assert report["calibration"]["windows"] == 1
    for tensor in report["measured"]["tensors"]:
        assert tensor["damping"] is None or tensor["damping"] > 0
        assert 0 <= tensor["relative_error"] < 1 and tensor["dead_inputs"] == 0


def test_dead_inputs_are_counted(model: Path) -> None:
    """Five rows of up_proj are zero, so five inputs of down_proj never fire, and the count says so."""
    name = "model.layers.0.mlp.up_proj.weight"
    header, data = parts(model / "model.safetensors")
    begin, _ = header[name]["data_offsets"]
    raw(
        model / "model.safetensors",
        json.dumps(header).encode(),
        data[:begin] + bytes(5 * 64 * 4) + data[begin + 5 * 64 * 4 :],
    )
    file = model.parent / "ids.json"
    file.write_text(json.dumps([ROW] * 4))
    report = quantized(model, file)
    dead = {tensor["name"]: tensor["dead_inputs"] for tensor in report["measured"]["tensors"]}
    assert dead.pop("model.layers.0.mlp.down_proj") == 5
    assert not any(dead.values())


def quantized(model: Path, source: Path) -> dict[str, Any]:
    result = succeed(*arguments(model, source))
    manifest: dict[str, Any] = json.loads((model.parent / "out" / "anequant.json").read_text())
    dead = [tensor for tensor in manifest["measured"]["tensors"] if tensor["dead_inputs"]]
    assert bool(dead) == ("inputs that no token used" in result.stdout)
    return manifest


@pytest.mark.parametrize("words", [("convert", "--recipe", "w8-nearest"), ("plan",)])
def test_a_tokenizer_of_another_model_is_no_tokenizer_for_packages(
    make_model: Callable[..., Path], tiny_qwen2: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Recipes without calibration read a text too: what packages have to hold is measured on one."""
    model = make_model(tmp_path / "model", "qwen2", False, vocab_size=96, num_hidden_layers=1)
    for name in TOKENIZER:
        shutil.copyfile(tiny_qwen2 / name, model / name)
    command, *more = words
    output = ["-o", tmp_path / "out"] if command == "convert" else []
    told = ("the tokenizer gives token 8189, the model knows 96", "tokenizer and model belong together")
    assert_refused(tmp_path, [command, model, *output, *more], BAD, *told)
