"""Every rule with a program that breaks it; our own packages, which break none; the traced path."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from anequant.cli import main
from anequant.coreml.lint import CHIPS, Finding, lint_package
from anequant.coreml.package import WEIGHT_FILE, save_package
from anequant.coreml.program import build_program
from anequant.coreml.toolkit import TARGET, Function, ct, get_new_symbol, mb, types
from anequant.errors import InputError, UsageError, VerificationError
from anequant.pipeline.lint import lint, require_clean
from anequant.pipeline.lower import LowerOptions, lower

Body = Callable[[dict[str, Any]], Any]
C, S = 64, 8


def package(
    folder: Path, body: Body, *, inputs: dict[str, Any] | None = None, functions: tuple[str, ...] = ("main",)
) -> Path:
    """A program of `body` over x, float16 (1, 64, 1, 8), saved as it stands."""
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


def lut(shape: tuple[int, ...], groups: tuple[int, ...] = (), entries: int = 16, top: float = 1) -> Any:
    """A palettized constant of this shape."""
    kinds = {8: types.np_uint3_dtype, 16: types.np_uint4_dtype}
    groups = groups or (1,) * len(shape)
    table = np.linspace(-top, top, int(np.prod(groups)) * entries, dtype=np.float16)
    indices = np.zeros(shape, np.uint8).astype(kinds[entries])
    return mb.constexpr_lut_to_dense(indices=indices, lut=table.reshape(*groups, entries, 1))


def conv(x: Any, weight: Any = None) -> Any:
    return mb.conv(x=x, weight=half(C, C, 1, 1) if weight is None else weight)


def scaled(x: Any) -> Any:
    return mb.mul(x=x, y=mb.const(val=half(1, C, 1, 1)))


def five_axes(v: dict[str, Any]) -> Any:
    x = mb.reshape(x=conv(v["x"]), shape=[1, 8, 8, 1, S])
    return mb.reshape(x=mb.mul(x=x, y=np.float16(2)), shape=[1, C, 1, S])


def flat(v: dict[str, Any]) -> Any:
    return mb.reshape(x=conv(v["x"]), shape=[S, C])


def state_inputs(dtype: Any = types.fp16, depth: int = 32, count: int = 1) -> dict[str, Any]:
    states = {f"kv{i}": mb.state_tensor_placeholder((2, 1, 16, depth), dtype=dtype) for i in range(count)}
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


def chosen_early(v: dict[str, Any]) -> Any:
    choice = mb.reduce_argmax(x=conv(v["x"]), axis=1, keep_dims=True)
    return mb.gather(x=half(C, 4), indices=choice, axis=0, validate_indices=False)


BREACHES: dict[str, tuple[str, Body]] = {
    "S1": ("warning", five_axes),
    "S2": ("warning", lambda v: mb.linear(x=flat(v), weight=half(8, C))),
    "S4": ("error", lambda v: mb.conv(x=v["x"], weight=half(16400, C, 1, 1))),
    "S6": ("warning", lambda v: mb.tile(x=conv(v["x"]), reps=[1, 1, 1, 2])),
    "S7": ("warning", lambda v: mb.mul(x=v["x"], y=v["x"])),
    "S7b": ("warning", lambda v: [y := conv(v["x"]), mb.identity(x=y)]),
    "S8": (
        "warning",
        lambda v: mb.matmul(
            x=half(1, 1, 1, 64),
            y=mb.reshape(x=mb.tile(x=conv(v["x"]), reps=[1, 256, 1, 64]), shape=[1, 1, 64, 131072]),
        ),
    ),
    "D1": ("error", lambda v: mb.cast(x=conv(v["x"]), dtype="fp32")),
    "D2": (
        "warning",
        lambda v: [
            conv(v["x"]),
            mb.gather(x=half(70000, 2), indices=np.array([1], np.int32), axis=0, validate_indices=False),
        ],
    ),
    "D3": ("error", lambda v: mb.add(x=conv(v["x"]), y=mb.const(val=half(1, 1, 1, S, value=-np.inf)))),
    "D4": ("note", lambda v: mb.silu(x=conv(v["x"]))),
    "N2": ("warning", lambda v: mb.rsqrt(x=conv(v["x"]), epsilon=np.float16(1e-3))),
    "A1": ("warning", lambda v: mb.scaled_dot_product_attention(query=v["x"], key=v["x"], value=v["x"])),
    "A2": ("warning", chosen_early),
    "I1": ("error", lambda v: mb.conv(x=v["x"], weight=half(C, C, 1, 1), name="layer.0.conv")),
    "W1": (
        "error",
        lambda v: scaled(
            conv(
                v["x"],
                mb.constexpr_blockwise_shift_scale(
                    data=np.zeros((C, C, 1, 1), np.int8), scale=half(C, 2, 1, 1)
                ),
            )
        ),
    ),
    "W2": ("error", lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), (1, C, 1, 1))))),
    "W3": ("note", lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), entries=8)))),
    "W6": (
        "warning",
        lambda v: scaled(conv(v["x"], mb.constexpr_sparse_to_dense(nonzero_data=half(1), mask=_mask()))),
    ),
    "W8": ("warning", lambda v: conv(v["x"], lut((C, C, 1, 1)))),
    "W9": ("error", lambda v: mb.mul(x=conv(v["x"]), y=lut((1, C, 1, 1)))),
    "W10": ("warning", lambda v: conv(scaled(conv(v["x"], lut((C, C, 1, 1)))))),
    "N1": ("warning", lambda v: scaled(conv(v["x"], lut((C, C, 1, 1), top=1000)))),
}


def _mask() -> Any:
    mask = np.zeros((C, C, 1, 1), np.uint8)
    mask[0, 0, 0, 0] = 1
    return mask.astype(types.np_uint1_dtype)


def broken(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.rule, finding.severity) for finding in findings}


@pytest.mark.parametrize("rule", BREACHES)
def test_a_breach_is_found(tmp_path: Path, rule: str) -> None:
    severity, body = BREACHES[rule]
    findings = lint_package(package(tmp_path, body))
    assert (rule, severity) in broken(findings)
    assert all(finding.why and finding.remedy and finding.op for finding in findings)
    expected = {rule, *{"S8": ("S2", "S4", "S6"), "D2": ("S4",), "A2": ("S1",)}.get(rule, ())}
    assert {finding.rule for finding in findings} <= expected


STATES: dict[str, tuple[str, Body, dict[str, Any]]] = {
    "T1": ("error", with_states, state_inputs(count=3)),
    "T2": ("warning", with_states, state_inputs(depth=24)),
    "T3": ("error", shifted, state_inputs()),
}


@pytest.mark.parametrize("rule", STATES)
def test_a_breach_of_a_state_is_found(tmp_path: Path, rule: str) -> None:
    severity, body, inputs = STATES[rule]
    assert broken(lint_package(package(tmp_path, body, inputs=inputs))) == {(rule, severity)}


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


def test_grouped_tables(tmp_path: Path) -> None:
    """Few groups of output channels cost a little, one a channel a lot, blocks do not compile."""
    for number, (groups, severity) in enumerate(
        [((8, 1, 1, 1), "warning"), ((C, 1, 1, 1), "error"), ((8, 8, 1, 1), "error")]
    ):
        (tmp_path / str(number)).mkdir()
        path = package(tmp_path / str(number), lambda v, g=groups: scaled(conv(v["x"], lut((C, C, 1, 1), g))))
        assert broken(lint_package(path)) == {("W2", severity)}


def test_constants_that_functions_do_not_share(tmp_path: Path) -> None:
    def body(v: dict[str, Any]) -> Any:
        weight = mb.const(val=half(C, C, 1, 1), name="weight")
        return mb.conv(x=v["x"], weight=weight)

    findings = lint_package(package(tmp_path, body, functions=("infer", "prefill")))
    assert broken(findings) == {("P2", "warning")}


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
    with pytest.raises(UsageError, match="unknown chip 'm33'") as caught:
        lint_package(path, "m33")
    assert "m3" in caught.value.remedy


# --- whole packages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunks": 3}, {"argmax": True}], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_what_lower_writes_is_clean(
    make_model: Callable[..., Path],
    quantize_model: Callable[..., Any],
    tmp_path: Path,
    model_type: str,
    options: dict[str, Any],
) -> None:
    """The one note is silu's; the traced form of the network has it too."""
    model = make_model(tmp_path / "model", model_type, False, vocab_size=112)
    lower(quantize_model(model, "w4-nearest").folder, tmp_path / "out", LowerOptions(32, 16, **options))
    findings = lint(tmp_path / "out")
    assert broken(findings) == {("D4", "note")}
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
        return self.conv(x * self.input_scale) * self.output_scale


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"mode": "kmeans", "granularity": "per_tensor"}, {("W8", "warning")}),
        (
            {"mode": "kmeans", "granularity": "per_tensor", "enable_per_channel_scale": True},
            {("W2", "error"), ("W1", "error")},
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
        traced = torch.jit.trace(Scaled().eval(), torch.zeros(1, 256, 1, 8))
        model = ct.convert(
            traced,
            inputs=[ct.TensorType("x", shape=(1, 256, 1, 8), dtype=np.float16)],
            outputs=[ct.TensorType("y", dtype=np.float16)],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        settings = optimize.OptimizationConfig(global_config=optimize.OpPalettizerConfig(nbits=4, **config))
        optimize.palettize_weights(model, settings).save(str(tmp_path / "traced.mlpackage"))
    found = broken(lint_package(tmp_path / "traced.mlpackage"))
    assert found & expected
    assert ("W8", "warning") in found or ("W2", "error") in found


# --- the command --------------------------------------------------------------------------------------


def test_the_command_exits_with_6_on_errors(tmp_path: Path) -> None:
    bad = package(tmp_path, BREACHES["D1"][1])
    result = CliRunner().invoke(main, ["lint", str(bad)])
    assert result.exit_code == 6 and "error" in result.stdout and "D1" in result.stdout
    result = CliRunner().invoke(main, ["lint", str(bad), "--json"])
    assert json.loads(result.stdout)["findings"][0]["rule"] == "D1"
    with pytest.raises(VerificationError, match="rule D1"):
        require_clean(lint(bad))


def test_the_command_on_a_clean_package(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["lint", str(package(tmp_path, lambda v: conv(v["x"])))])
    assert (result.exit_code, result.stdout) == (0, "lint  nothing found\n")


def test_a_folder_without_packages(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no packages"):
        lint(tmp_path)
