"""Numbers that are possible but strange, and settings that change what a layer computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import Damage, assert_refused, parts, raw, write
from running import succeed
from safetensors.torch import load_file

from anequant.errors import InputError, UnsupportedError, UsageError

pytestmark = pytest.mark.usefixtures("warm")

BAD, UNSUPPORTED, USAGE = InputError.exit_code, UnsupportedError.exit_code, UsageError.exit_code
UP, GAIN = "model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Values = np.ndarray[Any, np.dtype[np.float32]]


def values(name: str, change: Callable[[Values], Any]) -> Damage:
    """Change a tensor, in place or by what `change` returns."""

    def damage(model: Path) -> None:
        header, data = parts(model / "model.safetensors")
        begin, end = header[name]["data_offsets"]
        tensor = np.frombuffer(data[begin:end], np.float32).copy().reshape(header[name]["shape"])
        changed = change(tensor)
        tensor = tensor if changed is None else changed.astype(np.float32)
        whole = data[:begin] + tensor.tobytes() + data[end:]
        raw(model / "model.safetensors", json.dumps(header).encode(), whole)

    return damage


def at(place: Any, number: float) -> Callable[[Values], None]:
    return lambda tensor: tensor.__setitem__(place, number)


def config(**changes: Any) -> Damage:
    def damage(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


HANDLED: dict[str, Damage] = {
    "a row of zeros": values(UP, at(3, 0.0)),
    "a column of zeros": values(UP, at((slice(None), 3), 0.0)),
    "a tensor of zeros": values(UP, at(..., 0.0)),
    "denormals": values(UP, at(..., 1e-40)),
    "a constant": values(UP, at(..., 0.5)),
    "one outlier": values(UP, at((0, 0), 6e4)),
    "a gain of zero": values(GAIN, at(5, 0.0)),
    "negative gains": values(GAIN, lambda tensor: -tensor),
    "denormal gains": values(GAIN, at(..., 1e-42)),
    "an embedding of zeros": values(EMBEDDING, at(..., 0.0)),
}

REFUSED: dict[str, tuple[Damage, int, tuple[str, ...]]] = {
    "an outlier that leaves float16": (
        values(UP, at((0, 0), 3e38)),
        UNSUPPORTED,
        ("'model.layers.1.mlp.up_proj' holds", "more than float16"),
    ),
    "a gain that leaves float16": (
        values(GAIN, at(..., 1e30)),
        UNSUPPORTED,
        ("'model.layers.0.self_attn.q_proj' holds", "after folding"),
    ),
    "gains of zero below a bias": (
        values(GAIN, at(..., 0.0)),
        UNSUPPORTED,
        ("the bias of 'model.layers.0.self_attn.q_proj'", "float16 cannot hold both"),
    ),
    "a bias that leaves float16": (
        values("model.layers.0.self_attn.q_proj.bias", at(0, 7e4)),
        UNSUPPORTED,
        ("'model.layers.0.self_attn.q_proj' holds 7e+04",),
    ),
    "an embedding that leaves float16": (
        values(EMBEDDING, at((0, 0), 1e30)),
        UNSUPPORTED,
        (f"'{EMBEDDING}' holds", "float16 ends"),
    ),
    "a head of zeros": (values(HEAD, at(..., 0.0)), BAD, ("the model's own logits are all zero",)),
    "a final gain of zeros": (values(NORM, at(..., 0.0)), BAD, ("the model's own logits are all zero",)),
    "rope of an unknown type": (
        config(rope_parameters={"rope_type": "wobbly", "rope_theta": 1e4}),
        UNSUPPORTED,
        ("'rope_parameters' asks for RoPE of the unknown type 'wobbly'", "yarn"),
    ),
    "rope that is no table": (config(rope_scaling=[1]), BAD, ("'rope_scaling' is [1], not a table",)),
    "rope of another type": (config(rope_scaling={"type": 3}), UNSUPPORTED, ("unknown type 3",)),
    "rope without its factor": (
        config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        BAD,
        ("transformers cannot use 'config.json'", "factor"),
    ),
    "a word as factor": (
        config(rope_parameters={"rope_type": "linear", "factor": "x", "rope_theta": 1e4}),
        BAD,
        ("transformers cannot use 'config.json'",),
    ),
    "a negative theta": (
        config(rope_parameters={"rope_type": "default", "rope_theta": -1.0}),
        BAD,
        ("'rope_parameters.rope_theta' is -1.0",),
    ),
    "a word as theta": (config(rope_theta="x"), BAD, ("'rope_theta' is 'x'",)),
    "soft-capped scores": (config(attn_logit_softcapping=50.0), UNSUPPORTED, ("'attn_logit_softcapping'",)),
    "soft-capped logits": (config(final_logit_softcapping=30.0), UNSUPPORTED, ("'final_logit_softcapping'",)),
    "experts": (config(num_experts=8), UNSUPPORTED, ("'num_experts' is 8",)),
    "scaled logits": (config(logits_scaling=8.0), UNSUPPORTED, ("'logits_scaling' is 8.0",)),
    "layers of an unknown type": (config(layer_types=["wobbly"] * 2), BAD, ("transformers cannot use",)),
    "a type for one layer of two": (config(layer_types=["full_attention"]), BAD, ("cannot use",)),
    "a window shorter than the probe": (
        config(use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 2),
        UNSUPPORTED,
        ("sliding window of 8",),
    ),
}

IN_WEIGHTS = (
    *("an outlier that leaves float16", "a gain that leaves float16", "gains of zero below a bias"),
    *("a bias that leaves float16", "an embedding that leaves float16", "a head of zeros"),
    "a final gain of zeros",
)
"""What only the numbers themselves tell, which no plan reads."""

WIDTHS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a block larger than the width": (("--r1-block", "512"), ("512 does not fit a width of 64",)),
    "a block that is no power": (("--r1-block", "48"), ("power of two",)),
    "a block of R4": (("--r4", "block-hadamard", "--r4-block", "128"), ("128 does not fit a width of 64",)),
}


def arguments(model: Path) -> list[Any]:
    return ["quantize", model, "-o", model.parent / "out", "--recipe", "w4-nearest"]


@pytest.mark.parametrize("case", HANDLED)
def test_strange_numbers_are_quantized_and_verified(model: Path, case: str) -> None:
    HANDLED[case](model)
    for words in (arguments(model), ["verify", model.parent / "out"]):
        succeed(*words)


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_numbers_and_settings_are_refused(model: Path, case: str) -> None:
    damage, code, words = REFUSED[case]
    damage(model)
    assert_refused(model.parent, arguments(model), code, *words, planned=case not in IN_WEIGHTS)


@pytest.mark.parametrize("case", WIDTHS)
def test_a_block_that_does_not_fit_names_those_that_do(model: Path, case: str) -> None:
    options, words = WIDTHS[case]
    fitting = () if "power" in case else ("2, 4, 8, 16, 32, 64",)
    arguments = ["quantize", model, "-o", model.parent / "out", *options]
    assert_refused(model.parent, arguments, USAGE, *words, *fitting)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", ["w4-nearest", "w4-ane"])
def test_a_number_that_is_not_finite_is_named(model: Path, number: float, recipe: str) -> None:
    values(UP, at((2, 7), number))(model)
    words = (f"'{UP}' holds 1 values that are not finite, the first at [2, 7]", "model.safetensors")
    arguments = ["quantize", model, "-o", model.parent / "out", "--recipe", recipe]
    assert_refused(model.parent, arguments, BAD, *words, planned=False)


def test_a_model_that_overflows_is_not_sampled_from(model: Path) -> None:
    values(UP, at((0, 0), 3e38))(model)
    arguments = ["quantize", model, "-o", model.parent / "out", "--calib-length", "24"]
    words = ("the model's own logits are not finite", str(model))
    assert_refused(model.parent, arguments, BAD, *words, planned=False)


def test_a_width_without_a_hadamard_matrix_names_blocks(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 92, "num_hidden_layers": 1}
    model = make_model(tmp_path / "place" / "model", "qwen2", False, head_dim=32, **sizes)
    arguments = ["quantize", model, "-o", model.parent / "out", "--r1", "hadamard"]
    assert_refused(model.parent, arguments, UNSUPPORTED, "order 92", "1, 2, 4")


SIZES = {"BOOL": 1, "I64": 8, "I32": 4, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}


def stored_as(dtype: str, size: int, model: Path) -> None:
    """The final norm as zeros of another dtype."""
    header, data = parts(model / "model.safetensors")
    header[NORM] = {"dtype": dtype, "shape": [64], "data_offsets": [len(data), len(data) + 64 * size]}
    write(model / "model.safetensors", header, data + bytes(64 * size))


@pytest.mark.parametrize("dtype", SIZES)
def test_a_dtype_without_a_fold_is_refused(model: Path, dtype: str) -> None:
    stored_as(dtype, SIZES[dtype], model)
    assert_refused(model.parent, arguments(model), BAD, f"tensor '{NORM}' is {dtype}, not a float")


def test_mixed_dtypes_are_read(model: Path) -> None:
    """One tensor in bfloat16, one in float64, the others in float32: as the same numbers in float32 are."""
    plain = quantized(model, "plain")
    header, data = parts(model / "model.safetensors")
    for name, dtype in ((NORM, torch.bfloat16), (UP, torch.float64)):
        begin, end = header[name]["data_offsets"]
        tensor = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float32)
        tensor = tensor.bfloat16() if name == NORM else tensor.double()
        content = tensor.view(torch.uint8).numpy().tobytes()
        header[name] |= {"data_offsets": [len(data), len(data) + len(content)]}
        header[name]["dtype"] = {torch.bfloat16: "BF16", torch.float64: "F64"}[dtype]
        data += content
    write(model / "model.safetensors", header, data)
    mixed = quantized(model, "mixed")
    assert mixed.keys() == plain.keys()
    assert torch.equal(mixed[UP], plain[UP])
    assert 0 < float((mixed[HEAD].float() - plain[HEAD].float()).abs().max()) < 0.02


def quantized(model: Path, name: str) -> dict[str, torch.Tensor]:
    words = ["quantize", model, "-o", model.parent / name, "--recipe", "w4-nearest", "--quiet"]
    succeed(*words)
    loaded: dict[str, torch.Tensor] = load_file(model.parent / name / "model.safetensors")
    return loaded
