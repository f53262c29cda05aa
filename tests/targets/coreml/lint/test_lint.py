"""Every rule with a program that breaks it; our own packages, which break none; the traced path."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Quantized
from running import invoke
from torch import nn

from anequant.checkpoints.source import Source
from anequant.errors import InputError, UsageError, VerificationError
from anequant.lower_options import LowerOptions
from anequant.pipeline.convert import convert
from anequant.pipeline.lower import lower
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe
from anequant.request import LowerRequest, Request
from anequant.targets.coreml.lint.chips import CHIPS
from anequant.targets.coreml.lint.lint import lint, lint_package
from anequant.targets.coreml.lint.operation_rules import GRAPH_RULES
from anequant.targets.coreml.lint.shape_rules import SHAPE_RULES
from anequant.targets.coreml.lint.state_rules import STATE_RULES
from anequant.targets.coreml.lint.sum_rules import SUM_RULES
from anequant.targets.coreml.lint.weight_rules import WEIGHT_RULES
from anequant.targets.coreml.program.package import MODEL_FILE, WEIGHT_FILE, save_package
from anequant.targets.coreml.program.program import build_program
from anequant.targets.coreml.storage import read_model
from anequant.targets.coreml.toolkit import TARGET, Function, MIL_pb2, ct, get_new_symbol, mb, types
from anequant.targets.shared.finding import Finding, require_clean

Body = Callable[[dict[str, Any]], Any]
C, S = 64, 32
FEW_TOKENS = Calibration(("self",), samples=6, length=64)


def package(
    folder: Path, body: Body, *, inputs: dict[str, Any] | None = None, functions: tuple[str, ...] = ("main",)
) -> Path:
    """A program of `body` over x, float16 (1, 64, 1, 32), saved as it stands."""
    built = {}
    for name in functions:
        given = inputs or {"x": mb.placeholder((1, C, 1, S), dtype=types.fp16)}
        with Function(dict(given), opset_version=TARGET) as function:
            outputs = body(function.inputs)
            function.set_outputs(outputs if isinstance(outputs, list) else [outputs])
        built[name] = function
    save_package(build_program(built), folder / "p.mlpackage", {})
    return folder / "p.mlpackage"


def half(*shape: int, value: float = 0.5) -> Any:
    return np.full(shape, value, np.float16)


def lut(
    shape: tuple[int, ...],
    groups: tuple[int, ...] = (),
    *,
    entries: int = 16,
    top: float = 1,
    code: int = 0,
    length: int = 1,
    axis: int = 0,
) -> Any:
    """A palettized constant of this shape, all codes the same, an entry extending `axis` to `length`."""
    kinds = {8: types.np_uint3_dtype, 16: types.np_uint4_dtype}
    groups = groups or (1,) * len(shape)
    table = np.linspace(-top, top, int(np.prod(groups)) * entries * length, dtype=np.float16)
    codes = [size // length if index == axis else size for index, size in enumerate(shape)]
    return mb.constexpr_lut_to_dense(
        indices=np.full(codes, code, np.uint8).astype(kinds[entries]),
        lut=table.reshape(*groups, entries, length),
        vector_axis=axis if length > 1 else None,
    )


def integers(*scales: int, data: Any = None) -> Any:
    """An 8-bit weight (64, 64, 1, 1) with scales of this shape."""
    data = np.ones((C, C, 1, 1), np.int8) if data is None else data
    return mb.constexpr_blockwise_shift_scale(data=data, scale=half(*scales))


def sparse_table() -> Any:
    mask, nonzero = mb.constexpr_lut_to_sparse(
        indices_mask=_mask(),
        indices_nonzero_data=np.zeros(1, np.uint8).astype(types.np_uint4_dtype),
        lut=np.linspace(-1, 1, 16, dtype=np.float16).reshape(1, 1, 1, 1, 16, 1),
    )
    return mb.constexpr_sparse_to_dense(nonzero_data=nonzero, mask=mask)


def quantized_table() -> Any:
    table = mb.constexpr_blockwise_shift_scale(
        data=np.arange(16, dtype=np.int8).reshape(1, 1, 1, 1, 16, 1), scale=half(1, 1, 1, 1, 1, 1)
    )
    return mb.constexpr_lut_to_dense(
        indices=np.zeros((C, C, 1, 1), np.uint8).astype(types.np_uint4_dtype), lut=table
    )


def folded_codes() -> Any:
    """Codes of 16 values, each row scaled by its own number."""
    codes = np.random.default_rng(0).integers(16, size=(C, C, 1, 1)) - 7.5
    return (codes * np.linspace(0.1, 0.2, C).reshape(C, 1, 1, 1)).astype(np.float16)


def eight_bits(v: dict[str, Any], *channels: int) -> Any:
    axis = 1 if channels else None
    scale = half(*channels) if channels else np.float16(0.5)
    codes = mb.quantize(input=v["x"], scale=scale, output_dtype="int8", axis=axis)
    return conv(mb.dequantize(input=codes, scale=scale, axis=axis))


def attended(v: dict[str, Any]) -> Any:
    x = mb.reshape(x=conv(v["x"]), shape=[1, 1, S, C])
    return mb.matmul(x=mb.softmax(x=mb.matmul(x=x, y=x, transpose_y=True), axis=-1), y=x)


def conv(x: Any, weight: Any = None) -> Any:
    return mb.conv(x=x, weight=half(C, C, 1, 1) if weight is None else weight)


def scaled(x: Any) -> Any:
    return mb.mul(x=x, y=mb.const(val=half(1, C, 1, 1)))


def five_axes(v: dict[str, Any]) -> Any:
    x = mb.reshape(x=conv(v["x"]), shape=[1, 8, 8, 1, S])
    return mb.reshape(x=mb.mul(x=x, y=np.float16(2)), shape=[1, C, 1, S])


def flat(v: dict[str, Any]) -> Any:
    return mb.reshape(x=conv(v["x"]), shape=[S, C])


def moved_slice(v: dict[str, Any]) -> Any:
    zero = np.array([0], np.int32)
    begin = mb.concat(values=[zero, v["start"], zero, zero], axis=0)
    return mb.slice_by_size(x=conv(v["x"]), begin=begin, size=[1, 8, 1, S])


def state_inputs(depth: int = 32, count: int = 1) -> dict[str, Any]:
    states = {
        f"kv{i}": mb.state_tensor_placeholder((2, 1, 16, depth), dtype=types.fp16) for i in range(count)
    }
    return {"x": mb.placeholder((1, C, 1, S), dtype=types.fp16), **states}


def with_states(v: dict[str, Any]) -> list[Any]:
    outputs = [conv(v["x"])]
    for name, state in v.items():
        if name.startswith("kv"):
            cache = mb.read_state(input=state)
            mb.coreml_update_state(state=state, value=mb.mul(x=cache, y=cache))
    return outputs


def shifted(v: dict[str, Any]) -> Any:
    cache = mb.read_state(input=v["kv0"])
    tail = mb.slice_by_index(x=cache, begin=[0, 0, 1, 0], end=[2, 1, 16, 32])
    head = mb.slice_by_index(x=cache, begin=[0, 0, 0, 0], end=[2, 1, 1, 32])
    mb.coreml_update_state(state=v["kv0"], value=mb.concat(values=[tail, head], axis=2))
    return conv(v["x"])


def returned_before_update(v: dict[str, Any]) -> list[Any]:
    cache = mb.read_state(input=v["kv0"])
    mb.coreml_update_state(state=v["kv0"], value=mb.mul(x=cache, y=cache))
    return [conv(v["x"]), mb.sqrt(x=cache)]


def returned_after_update(v: dict[str, Any]) -> list[Any]:
    cache = mb.read_state(input=v["kv0"])
    cache = mb.coreml_update_state(state=v["kv0"], value=mb.mul(x=cache, y=cache))
    return [conv(v["x"]), mb.sqrt(x=cache)]


def called_twice(v: dict[str, Any]) -> Any:
    return mb.sqrt(x=mb.sqrt(x=conv(v["x"]), name="root"), name="root")


def chosen_early(v: dict[str, Any]) -> Any:
    choice = mb.squeeze(x=mb.reduce_argmax(x=conv(v["x"]), axis=1, keep_dims=True), axes=[0, 1, 2])
    return mb.gather(x=half(C, 4), indices=choice, axis=0, validate_indices=False)


BREACHES: dict[str, tuple[str, Body]] = {
    "S1": ("warning", five_axes),
    "S2": ("warning", lambda v: mb.linear(x=flat(v), weight=half(8, C))),
    "S3": ("note", lambda v: conv(mb.slice_by_index(x=v["x"], begin=[0] * 4, end=[1, C, 1, 24]))),
    "S4": ("error", lambda v: mb.conv(x=v["x"], weight=half(16400, C, 1, 1))),
    "S6": ("warning", lambda v: mb.tile(x=conv(v["x"]), reps=[1, 1, 1, 2])),
    "S6, wide kernel": ("warning", lambda v: conv(v["x"], half(C, C, 1, 16))),
    "S7": ("warning", lambda v: mb.mul(x=v["x"], y=v["x"])),
    "S7b": ("warning", lambda v: [y := conv(v["x"]), mb.identity(x=y)]),
    "D1": ("error", lambda v: mb.cast(x=mb.exp(x=mb.cast(x=conv(v["x"]), dtype="fp32")), dtype="fp16")),
    "D2": (
        "warning",
        lambda v: [
            conv(v["x"]),
            mb.gather(x=half(70000, 2), indices=np.array([1], np.int32), axis=0, validate_indices=False),
        ],
    ),
    "D3": ("error", lambda v: mb.add(x=conv(v["x"]), y=mb.const(val=half(1, 1, 1, S, value=-np.inf)))),
    "D3, smallest": (
        "warning",
        lambda v: mb.add(x=conv(v["x"]), y=mb.const(val=half(1, 1, 1, S, value=-65504))),
    ),
    "D4": ("note", lambda v: mb.silu(x=conv(v["x"]))),
    "N1": ("warning", lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), top=1000)))),
    "N1, float": ("warning", lambda v: conv(v["x"], half(C, C, 1, 1, value=600))),
    "N2": ("warning", lambda v: mb.rsqrt(x=conv(v["x"]), epsilon=np.float16(1e-3))),
    "N3": ("note", attended),
    "N4": ("warning", lambda v: conv(v["x"], integers(C, 1, 1, 1, data=lut((C, C, 1, 1))))),
    "Q1": ("warning", eight_bits),
    "Q1, scales": ("warning", lambda v: eight_bits(v, C)),
    "A1": ("warning", lambda v: mb.scaled_dot_product_attention(query=v["x"], key=v["x"], value=v["x"])),
    "A2": ("warning", chosen_early),
    "I1": ("error", lambda v: mb.conv(x=v["x"], weight=half(C, C, 1, 1), name="layer.0.conv")),
    "I1, twice": ("error", called_twice),
    "W1": ("error", lambda v: scaled(conv(v["x"], integers(C, 2, 1, 1)))),
    "W1, rows": ("error", lambda v: scaled(conv(v["x"], integers(2, 1, 1, 1)))),
    "W2": ("error", lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), (1, C, 1, 1))))),
    "W2, few": ("warning", lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), (8, 1, 1, 1))))),
    "W2, one a channel": ("error", lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), (C, 1, 1, 1))))),
    "W3": ("note", lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), entries=8)))),
    "W4": ("error", lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), (8, 8, 1, 1))))),
    "W5": ("error", lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), length=2, axis=1)))),
    "W5, long": ("error", lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), length=32)))),
    "W6": ("warning", lambda v: conv(v["x"], sparse_table())),
    "W7": ("note", lambda v: scaled(conv(v["x"], quantized_table()))),
    "W8": ("note", lambda v: conv(v["x"], integers(C, 1, 1, 1))),
    "W9": ("warning", lambda v: conv(v["x"], lut((C, C, 1, 1)))),
    "W9, float": ("warning", lambda v: conv(v["x"], folded_codes())),
    "W10": ("error", lambda v: mb.mul(x=conv(v["x"]), y=lut((1, C, 1, 1)))),
    "W11": ("warning", lambda v: conv(scaled(conv(v["x"], lut((C, C, 1, 1)))))),
}


def _mask() -> Any:
    mask = np.zeros((C, C, 1, 1), np.uint8)
    mask[0, 0, 0, 0] = 1
    return mask.astype(types.np_uint1_dtype)


def broken(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.rule, finding.severity) for finding in findings}


@pytest.mark.parametrize("case", BREACHES)
def test_a_breach_is_found_by_its_rule_alone(tmp_path: Path, case: str) -> None:
    severity, body = BREACHES[case]
    findings = lint_package(package(tmp_path, body))
    assert broken(findings) == {(case.partition(",")[0], severity)}
    assert all(finding.why and finding.remedy and finding.op for finding in findings)


def long_operand(v: dict[str, Any]) -> Any:
    """16384 positions of 512: 1 MiB for each of 16 cores."""
    return mb.matmul(x=mb.reshape(x=conv(v["x"]), shape=[1, 1, 4, 512]), y=v["long"])


LONG = {
    "x": mb.placeholder((1, C, 1, S), dtype=types.fp16),
    "long": mb.placeholder((1, 1, 512, 16384), dtype=types.fp16),
}
MOVED = {
    "x": mb.placeholder((1, C, 1, S), dtype=types.fp16),
    "start": mb.placeholder((1,), dtype=types.int32),
}
WITH_INPUTS: dict[str, tuple[str, Body, dict[str, Any]]] = {
    "S6, computed positions": ("warning", moved_slice, MOVED),
    "S8": ("warning", long_operand, LONG),
    "T1": ("error", with_states, state_inputs(count=3)),
    "T2": ("warning", with_states, state_inputs(depth=24)),
    "T3": ("error", shifted, state_inputs()),
    "T4": ("warning", returned_before_update, state_inputs()),
}


@pytest.mark.parametrize("case", WITH_INPUTS)
def test_a_breach_that_needs_other_inputs_is_found(tmp_path: Path, case: str) -> None:
    severity, body, inputs = WITH_INPUTS[case]
    assert broken(lint_package(package(tmp_path, body, inputs=inputs))) == {
        (case.partition(",")[0], severity)
    }


def test_every_rule_has_a_program_that_breaks_it() -> None:
    rules = (*SHAPE_RULES, *GRAPH_RULES, *WEIGHT_RULES, *SUM_RULES, *STATE_RULES)
    covered = {case.partition(",")[0] for case in (*BREACHES, *WITH_INPUTS)}
    assert sorted(rule.id for rule in rules) == sorted(covered)


# What comes close to a breach and is none.

SOUND: dict[str, Body] = {
    "one last position": lambda v: conv(mb.slice_by_index(x=v["x"], begin=[0] * 4, end=[1, C, 1, 1])),
    "cast at the border": lambda v: mb.cast(x=conv(v["x"]), dtype="fp32"),
    "a mask of -1e4": lambda v: mb.add(x=conv(v["x"]), y=mb.const(val=half(1, 1, 1, S, value=-1e4))),
    "large entries that few codes take": lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), top=1000, code=8))),
    "vectors along output channels": lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), length=2))),
    "rows of many values": lambda v: conv(
        v["x"], np.random.default_rng(0).normal(size=(C, C, 1, 1)).astype(np.float16)
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_what_is_sound_is_not_found(tmp_path: Path, case: str) -> None:
    assert lint_package(package(tmp_path, SOUND[case])) == []


def test_a_state_of_float32(tmp_path: Path) -> None:
    """coremltools writes none, so the saved one is changed."""
    path = package(tmp_path, with_states, inputs=state_inputs())
    model = read_model(path / MODEL_FILE)
    (function,) = model.mlProgram.functions.values()
    (state,) = (given for given in function.inputs if given.type.WhichOneof("type") == "stateType")
    state.type.stateType.wrappedType.tensorType.dataType = MIL_pb2.DataType.Value("FLOAT32")
    (path / MODEL_FILE).write_bytes(model.SerializeToString())
    assert broken(lint_package(path)) == {("T1", "error")}


def test_a_state_that_is_returned_after_its_update_is_fine(tmp_path: Path) -> None:
    assert lint_package(package(tmp_path, returned_after_update, inputs=state_inputs())) == []


def test_the_accumulator_bound_is_of_the_heaviest_row(tmp_path: Path) -> None:
    weight = half(C, C, 1, 1, value=1)
    weight[3] = -640
    (finding,) = lint_package(package(tmp_path, lambda v: conv(v["x"], weight)))
    assert finding.detail == "a row of magnitudes adds up to 40960: inputs up to 0.8 are safe"


@pytest.mark.parametrize(("bias", "found"), [(0, False), (-2000, True), (40000, True)])
def test_the_bias_takes_room_in_the_accumulator(tmp_path: Path, bias: float, found: bool) -> None:
    weight = half(C, C, 1, 1, value=496)
    path = package(tmp_path, lambda v: mb.conv(x=v["x"], weight=weight, bias=half(C, value=bias)))
    assert broken(lint_package(path)) == ({("N1", "warning")} if found else set())


@pytest.mark.parametrize(("axis", "found"), [(0, set()), (1, {("W1", "error")})])
def test_scales_of_the_form_before_ios_18(tmp_path: Path, axis: int, found: set[tuple[str, str]]) -> None:
    with Function(
        {"x": mb.placeholder((1, C, 1, S), dtype=types.fp16)}, opset_version=ct.target.iOS17
    ) as function:
        weight = mb.constexpr_affine_dequantize(
            quantized_data=np.ones((C, C, 1, 1), np.int8),
            zero_point=np.int8(0),
            scale=half(C),
            axis=np.int32(axis),
        )
        function.set_outputs([conv(function.inputs["x"], weight)])
    save_package(build_program({"main": function}), tmp_path / "p.mlpackage", {})
    assert broken(lint_package(tmp_path / "p.mlpackage")) == found


def test_one_state_of_float16_is_fine(tmp_path: Path) -> None:
    assert lint_package(package(tmp_path, with_states, inputs=state_inputs())) == []


def test_an_input_of_any_length(tmp_path: Path) -> None:
    inputs = {"x": mb.placeholder((1, C, 1, get_new_symbol()), dtype=types.fp16)}
    with Function(inputs, opset_version=TARGET) as function:
        function.set_outputs([conv(function.inputs["x"])])
    shape = ct.Shape((1, C, 1, ct.RangeDim(1, 64)))
    function.input_types = [ct.TensorType("x", shape=shape, dtype=np.float16)]
    save_package(build_program({"main": function}), tmp_path / "p.mlpackage", {})
    assert ("S6", "error") in broken(lint_package(tmp_path / "p.mlpackage"))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("palettized", [True, False])
def test_constants_that_functions_do_not_share(tmp_path: Path, shared: bool, palettized: bool) -> None:
    """Found by content: the copies need not have one name."""
    count = iter(range(9))

    def constant(value: Any) -> Any:
        weight = mb.const(val=value, name=f"constant_{next(count)}")
        if shared:
            weight.op.weight_id = f"weight_{value.dtype}"
        return weight

    def body(v: dict[str, Any]) -> Any:
        if not palettized:
            return conv(v["x"], constant(half(C, C, 1, 1)))
        codes = np.zeros((C, C, 1, 1), np.uint8).astype(types.np_uint4_dtype)
        table = np.linspace(-1, 1, 16, dtype=np.float16).reshape(1, 1, 1, 1, 16, 1)
        weight = mb.constexpr_lut_to_dense(indices=constant(codes), lut=constant(table))
        scale = constant(np.linspace(0.5, 1, C, dtype=np.float16).reshape(1, C, 1, 1))
        return mb.mul(x=conv(v["x"], weight), y=scale)

    findings = lint_package(package(tmp_path, body, functions=("infer", "prefill")))
    assert broken(findings) == (set() if shared else {("P2", "warning")})
    assert len(findings) == (0 if shared else 3 if palettized else 1)


@pytest.mark.parametrize(("size", "severity"), [(960_000_000, "warning"), (2_100_000_000, "error")])
def test_large_packages(tmp_path: Path, size: int, severity: str) -> None:
    path = package(tmp_path, lambda v: conv(v["x"]))
    with (path / WEIGHT_FILE).open("r+b") as file:
        file.truncate(size)
    assert broken(lint_package(path)) == {("P1", severity)}


def test_axes_depend_on_the_chip(tmp_path: Path) -> None:
    path = package(tmp_path, BREACHES["S4"][1])
    for name, chip in CHIPS.items():
        found = "S4" in {finding.rule for finding in lint_package(path, name)}
        assert found == (chip.axis < 16400)
    eight = package(tmp_path / "8", BREACHES["Q1"][1])
    assert {name for name in CHIPS if not lint_package(eight, name)} == {
        name for name in CHIPS if CHIPS[name].w8a8
    }
    whole = package(tmp_path / "int", BREACHES["W8"][1])
    assert [name for name in CHIPS if not lint_package(whole, name)] == ["m5"]
    with pytest.raises(UsageError, match="unknown chip 'm33'") as caught:
        lint_package(path, "m33")
    assert "m3" in caught.value.remedy


# --- whole packages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunks": 3}, {"argmax": True}], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_what_lower_writes_is_clean(
    make_model: Callable[..., Path],
    quantize_model: Callable[..., Quantized],
    tmp_path: Path,
    model_type: str,
    options: dict[str, Any],
) -> None:
    """Two notes, which the traced form of the network has too: silu and the product of attention."""
    model = make_model(tmp_path / "model", model_type, False, vocab_size=112)
    lower(
        LowerRequest(quantize_model(model, "w4-nearest").folder, LowerOptions(64, 32, **options)),
        tmp_path / "out",
    )
    findings = lint(tmp_path / "out")
    assert broken(findings) == {("D4", "note"), ("N3", "note")}
    assert require_clean(findings) == findings


class Scaled(nn.Module):
    """A linear between its two scale vectors, as people trace it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(256, 128, 1, bias=False)
        self.conv.weight.data = torch.randint(16, (128, 256, 1, 1), generator=generator).float() / 16 - 0.5
        self.input_scale = nn.Parameter(torch.rand(1, 256, 1, 1, generator=generator) + 0.5)
        self.output_scale = nn.Parameter(torch.rand(1, 128, 1, 1, generator=generator) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x * self.input_scale)
        return y * self.output_scale


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"mode": "kmeans", "granularity": "per_tensor"}, {("W9", "warning")}),
        (
            {"mode": "kmeans", "granularity": "per_tensor", "enable_per_channel_scale": True},
            {("W1", "error"), ("W2", "error"), ("W7", "note"), ("W9", "warning")},
        ),
    ],
    ids=["default", "per-channel scale"],
)
def test_trace_convert_palettize_is_caught(
    tmp_path: Path, config: dict[str, Any], expected: set[tuple[str, str]]
) -> None:
    """The scale goes into the convolution, and the per-channel scale varies over the wrong axis."""
    pytest.importorskip("sklearn", reason="coremltools' k-means needs scikit-learn")
    from coremltools.optimize import coreml as optimize

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Scaled().eval(), torch.zeros(1, 256, 1, S))
        model = ct.convert(
            traced,
            inputs=[ct.TensorType("x", shape=(1, 256, 1, S), dtype=np.float16)],
            outputs=[ct.TensorType("y", dtype=np.float16)],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        settings = optimize.OptimizationConfig(global_config=optimize.OpPalettizerConfig(nbits=4, **config))
        optimize.palettize_weights(model, settings).save(str(tmp_path / "traced.mlpackage"))
    assert broken(lint_package(tmp_path / "traced.mlpackage")) == expected


def test_convert_ends_with_lint_and_writes_nothing_on_errors(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", "llama", False, vocab_size=112)
    recipe, sizes = load_recipe("w4-nearest"), LowerOptions(64, 32)
    request = Request(Source(model, "model"), recipe, FEW_TOKENS, lowering=sizes)
    result = convert(request, tmp_path / "out")
    assert lint(tmp_path / "out") == lint(tmp_path / "out" / "packages") == list(result.lint)
    assert result.to_dict()["lint"] == [asdict(finding) for finding in result.lint]

    finding = replace(result.lint[0], severity="error")
    monkeypatch.setattr("anequant.pipeline.steps.checks.lint", lambda folder: [finding])
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(VerificationError, match=f"rule {finding.rule}"):
        convert(request, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- the command --------------------------------------------------------------------------------------


def test_the_command_exits_with_6_on_errors(tmp_path: Path) -> None:
    bad = package(tmp_path, BREACHES["D1"][1])
    result = invoke("lint", bad)
    assert result.exit_code == 6 and "error" in result.stdout and "D1" in result.stdout
    result = invoke("lint", bad, "--json")
    assert json.loads(result.stdout)["findings"][0]["rule"] == "D1"
    with pytest.raises(VerificationError, match="rule D1"):
        require_clean(lint(bad))


def test_the_command_on_a_clean_package(tmp_path: Path) -> None:
    result = invoke("lint", package(tmp_path, lambda v: conv(v["x"])))
    assert (result.exit_code, result.stdout) == (0, "lint  nothing found\n")


def test_a_folder_without_packages(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no packages"):
        lint(tmp_path)
