"""Saved packages, built here with coremltools' MIL builder, against numpy and the builder's own values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.converter import mil_convert
from coremltools.converters.mil.frontend.milproto.load import load as milproto_load
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, Var, get_new_symbol, types
from torch import Tensor

from anequant.errors import InputError, UnsupportedError
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.interpreter.operators import OPERATORS

Array = np.ndarray[Any, Any]
Palette = tuple[Array, Array]
"""Codes and their codebook."""

Run = Callable[[Array, dict[str, Array], str], Array]
"""Run a function with a hidden state and further inputs."""

TYPES = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32, "bool": types.bool}
CODES = {n: getattr(types, f"np_uint{n}_dtype") for n in (1, 2, 3, 4, 6)} | {8: np.dtype(np.uint8)}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def half(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (generator(seed).standard_normal(shape) * scale).astype(np.float16)


def function(body: Callable[..., Any], **inputs: Any) -> Function:
    """`inputs` are arrays (for their shapes and types), or ready placeholders."""
    given = {
        name: mb.placeholder(value.shape, dtype=TYPES[value.dtype.name])
        if isinstance(value, np.ndarray)
        else value
        for name, value in inputs.items()
    }
    with Function(given, opset_version=ct.target.iOS18) as result:
        outputs = body(**result.inputs)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        result.set_outputs([mb.identity(x=value, name=f"y{i}") for i, value in enumerate(outputs)])
    return result


def save(path: Path, input_types: list[ct.TensorType] | None = None, **functions: Function) -> Path:
    program = Program()
    for name, body in functions.items():
        program.add_function(name, body)
    if input_types:
        program.functions["main"].input_types = input_types
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = len(functions) > 1
    program.skip_all_passes = True
    model = mil_convert(
        program,
        convert_from="milinternal",
        convert_to="mlprogram",
        compute_units=ct.ComputeUnit.CPU_AND_NE,
        specification_version=ct.target.iOS18.value,
        main_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


def outputs(path: Path, inputs: Mapping[str, Array]) -> list[Array]:
    return [value.numpy() for value in Package.open(path).run(inputs).values()]


def assert_rounded(got: Array, exact: Array, ulps: float = 1.0) -> None:
    """fp16 `got` is `exact` up to the rounding of one operation; other types are equal."""
    exact = np.asarray(exact)
    assert got.shape == exact.shape
    if got.dtype == np.float16:
        bound = ulps * (2.0**-11 * np.abs(exact.astype(np.float64)) * 1.01 + 2.0**-24)
        assert (np.abs(got.astype(np.float64) - exact) <= bound).all()
    else:
        np.testing.assert_array_equal(got, exact)


A, B = half(2, 3, 4, seed=1), half(2, 3, 4, seed=2)
POSITIVE = np.abs(A) + np.float16(0.25)
M, N = generator(3).integers(-9, 9, (2, 2, 5)).astype(np.int32)
TRUE_FALSE, FALSE_TRUE = np.array([True, False, True]), np.array([False, False, True])
T1, T2 = np.array([1], np.int32), np.array([2], np.int32)
MASKS: dict[str, Any] = {"begin_mask": [True, False, False], "end_mask": [False, False, True]}
SLICE: dict[str, Any] = {"begin": [0, -2, 1], "end": [1, 3, 0], "stride": [1, 1, 2], **MASKS}
BACKWARDS = {"begin": [0, 2, 0], "end": [2, 0, 4], "stride": [1, -1, 1]}
SQUEEZE = {"begin": [1, 0, 1], "end": [0, 3, 3], "squeeze_mask": [True, False, False]}


def numpy_silu(x: Array) -> Array:
    y: Array = x / (1 + np.exp(-x))
    return y


def numpy_conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Sequence[int] = (1, 1),
    pad: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    groups: int = 1,
    pad_type: str = "valid",
) -> Array:
    assert pad_type == "custom" or not any(pad)
    x = np.pad(x, ((0, 0), (0, 0), (pad[0], pad[1]), (pad[2], pad[3])))
    n, _, rows, columns = x.shape
    o, i, kh, kw = weight.shape
    height = (rows - dilations[0] * (kh - 1) - 1) // strides[0] + 1
    width = (columns - dilations[1] * (kw - 1) - 1) // strides[1] + 1
    y = np.zeros((n, o, height, width))
    for c in range(o):
        group = x[:, c // (o // groups) * i : (c // (o // groups) + 1) * i]
        for h in range(height):
            for w in range(width):
                top, left = h * strides[0], w * strides[1]
                patch = group[:, :, top : top + dilations[0] * kh : dilations[0]][:, :, :kh]
                patch = patch[:, :, :, left : left + dilations[1] * kw : dilations[1]][..., :kw]
                y[:, c, h, w] = (patch * weight[c]).sum((1, 2, 3)) + (0 if bias is None else bias[c])
    return y


X, W, BIAS = half(2, 4, 5, 6, seed=4), half(6, 4, 1, 1, seed=5), half(6, seed=6)
CONVS: list[dict[str, Any]] = [
    {"weight": W, "bias": BIAS},
    {"weight": W, "strides": [2, 1]},
    {"weight": half(6, 4, 3, 2), "pad_type": "custom", "pad": [1, 0, 2, 1], "strides": [1, 2]},
    {"weight": half(6, 2, 2, 2), "bias": BIAS, "groups": 2, "dilations": [2, 3]},
    {"weight": half(4, 1, 1, 1), "groups": 4},
]
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *[(name, {"x": A, "y": B}, {}) for name in ("add", "sub", "mul", "maximum", "minimum", "real_div")],
    *[(name, {"x": M, "y": N}, {}) for name in ("add", "sub", "mul", "maximum", "minimum")],
    *[(name, {"x": M, "y": np.abs(N) + T1}, {}) for name in ("floor_div", "mod")],
    *[
        (n, {"x": M, "y": N}, {})
        for n in ("greater", "greater_equal", "less", "less_equal", "equal", "not_equal")
    ],
    *[(name, {"x": TRUE_FALSE, "y": FALSE_TRUE}, {}) for name in ("logical_and", "logical_or")],
    ("logical_not", {"x": TRUE_FALSE}, {}),
    ("add", {"x": A, "y": B[:1, :, :1]}, {}),
    ("pow", {"x": POSITIVE, "y": B}, {}),
    *[
        (name, {"x": A}, {})
        for name in ("abs", "cos", "sin", "exp", "tanh", "square", "relu", "sigmoid", "round")
    ],
    *[(name, {"x": POSITIVE}, {}) for name in ("sqrt", "rsqrt", "log", "inverse")],
    ("rsqrt", {"x": POSITIVE}, {"epsilon": 0.125}),
    ("clip", {"x": A}, {"alpha": np.float16(-0.5), "beta": np.float16(0.25)}),
    *[("gelu", {"x": A}, {"mode": m}) for m in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")],
    ("softmax", {"x": A}, {"axis": 1}),
    ("softmax", {"x": A}, {}),
    ("layer_norm", {"x": A}, {"axes": [1], "epsilon": 1e-3}),
    ("layer_norm", {"x": A}, {"axes": [-2, -1], "gamma": B[0], "beta": A[0]}),
    *[(n, {"x": A}, {"axes": [-1, 0]}) for n in ("reduce_sum", "reduce_mean", "reduce_max", "reduce_min")],
    *[(n, {"x": A}, {"axes": [1], "keep_dims": True}) for n in ("reduce_sum", "reduce_max")],
    ("reduce_sum", {"x": M}, {"axes": [0], "keep_dims": False}),
    ("reduce_argmax", {"x": np.array([[1, 3, 3], [2, 2, 0]], np.float16)}, {"axis": 1}),
    ("reduce_argmax", {"x": A}, {"axis": -2, "keep_dims": True}),
    ("matmul", {"x": A, "y": B}, {"transpose_y": True}),
    ("matmul", {"x": A, "y": B}, {"transpose_x": True}),
    ("linear", {"x": A}, {"weight": half(5, 4), "bias": half(5)}),
    ("identity", {"x": A}, {}),
    ("cast", {"x": A}, {"dtype": "int32"}),
    ("cast", {"x": M}, {"dtype": "fp16"}),
    ("cast", {"x": M}, {"dtype": "bool"}),
    ("select", {"cond": TRUE_FALSE.reshape(1, 3, 1) & np.ones((2, 3, 4), bool), "a": A, "b": B}, {}),
    ("shape", {"x": A}, {}),
    ("fill", {}, {"shape": [2, 3], "value": 1.5}),
    ("fill", {}, {"shape": [3], "value": 7}),
    ("range_1d", {}, {"start": 2, "end": 11, "step": 3}),
    ("concat", {"values": [A, B[:, :1]]}, {"axis": 1}),
    ("concat", {"values": [T1, T2]}, {"axis": 0}),
    ("stack", {"values": [A, B]}, {"axis": 1}),
    ("split", {"x": A}, {"axis": 2, "num_splits": 2}),
    ("split", {"x": A}, {"axis": -1, "split_sizes": [1, 3]}),
    ("tile", {"x": A}, {"reps": [1, 2, 3]}),
    ("reshape", {"x": A}, {"shape": [4, -1]}),
    ("reshape", {"x": A}, {"shape": [1, -1, 0]}),
    ("transpose", {"x": A}, {"perm": [2, 0, 1]}),
    ("expand_dims", {"x": A}, {"axes": [0, -1]}),
    ("squeeze", {"x": A[:1, :, :1]}, {"axes": [-1]}),
    ("squeeze", {"x": A[:1, :, :1]}, {}),
    ("gather", {"x": A, "indices": np.array([[2, 0], [1, 1]], np.int32)}, {"axis": 1}),
    ("gather", {"x": A, "indices": T1}, {"axis": -1}),
    ("slice_by_size", {"x": A}, {"begin": [0, 1, 2], "size": [2, 1, -1]}),
    ("slice_by_index", {"x": A}, SLICE),
    ("slice_by_index", {"x": A}, SQUEEZE),
    ("slice_update", {"x": A, "update": B[:1, :2, :2]}, SLICE),
]
OWN_REFERENCE: list[tuple[str, dict[str, Any], dict[str, Any], Callable[..., Array]]] = [
    ("silu", {"x": A}, {}, numpy_silu),
    ("gather", {"x": A, "indices": np.array([-1, 0], np.int32)}, {}, lambda x, indices: x[[1, 0]]),
    *[("conv", {"x": X}, keywords, numpy_conv) for keywords in CONVS],
    ("conv", {"x": X, "weight": W}, {}, numpy_conv),
    (
        "slice_update",
        {"x": A, "update": B[0, :, 1:3]},
        SQUEEZE,
        lambda x, update, **_: np.concatenate(
            [x[:1], np.concatenate([x[1:, :, :1], update[None], x[1:, :, 3:]], 2)]
        ),
    ),
]


def widened(value: Any) -> Any:
    """Every fp16 array in a value, a list or a dictionary as float32."""
    if isinstance(value, dict):
        return {name: widened(item) for name, item in value.items()}
    if isinstance(value, list):
        return [widened(item) for item in value]
    is_half = isinstance(value, (np.ndarray, np.generic)) and value.dtype == np.float16
    return value.astype(np.float32) if is_half else value


def cast(value: Var, dtype: str) -> Var:
    """Functions neither take nor give bool."""
    return mb.cast(x=value, dtype=dtype)


def run_operation(tmp_path: Path, kind: str, arrays: dict[str, Any], keywords: dict[str, Any]) -> list[Array]:
    flat: dict[str, Array] = {}
    for name, value in arrays.items():
        flat |= (
            {f"{name}{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        )

    def body(**given: Var) -> list[Var]:
        given.pop("unused", None)
        given = {
            name: cast(value, "bool") if flat[name].dtype == bool else value for name, value in given.items()
        }
        bound = {
            name: [given[f"{name}{i}"] for i in range(len(value))] if isinstance(value, list) else given[name]
            for name, value in arrays.items()
        }
        results = getattr(mb, kind)(**bound, **keywords)
        results = results if isinstance(results, (list, tuple)) else [results]
        return [cast(value, "int32") if value.dtype == types.bool else value for value in results]

    given = {name: value.astype(np.int32) if value.dtype == bool else value for name, value in flat.items()}
    given = given or {"unused": T1}
    return outputs(save(tmp_path / "p.mlpackage", main=function(body, **given)), given)


def builder_values(kind: str, arrays: dict[str, Any], keywords: dict[str, Any]) -> list[Array]:
    """The builder's own constant folding of the operation, in float32."""
    with Function({"unused": mb.placeholder((1,))}, opset_version=ct.target.iOS18) as scope:
        result = getattr(mb, kind)(**widened(arrays), **widened(keywords))
        scope.set_outputs([result] if not isinstance(result, (list, tuple)) else list(result))
    return [value.val for value in (result if isinstance(result, (list, tuple)) else [result])]


@pytest.mark.parametrize(("kind", "arrays", "keywords"), CASES)
def test_operation_equals_the_builders_value(
    tmp_path: Path, kind: str, arrays: dict[str, Any], keywords: dict[str, Any]
) -> None:
    got = run_operation(tmp_path, kind, arrays, keywords)
    for result, expected in zip(got, builder_values(kind, arrays, keywords), strict=True):
        assert_rounded(result, expected)


@pytest.mark.parametrize(("kind", "arrays", "keywords", "reference"), OWN_REFERENCE)
def test_operation_equals_numpy(
    tmp_path: Path,
    kind: str,
    arrays: dict[str, Any],
    keywords: dict[str, Any],
    reference: Callable[..., Array],
) -> None:
    got = run_operation(tmp_path, kind, arrays, keywords)[0]
    exact = reference(**widened(arrays), **widened(keywords))
    assert_rounded(got, exact)


def test_every_operation_is_exercised() -> None:
    """Those of integers in test_online_packages.py, those of constants below."""
    exercised = {case[0] for case in CASES} | {case[0] for case in OWN_REFERENCE}
    elsewhere = {"quantize", "dequantize", "constexpr_lut_to_dense", "constexpr_blockwise_shift_scale"}
    assert set(OPERATORS) - exercised == elsewhere


def test_every_value_is_rounded_to_fp16(tmp_path: Path) -> None:
    path = save(
        tmp_path / "p.mlpackage", main=function(lambda x, y: mb.mul(x=mb.add(x=x, y=y), y=y), x=A, y=B)
    )
    np.testing.assert_array_equal(outputs(path, {"x": A, "y": B})[0], (A + B) * B)
    big = np.full_like(A, 300)
    assert np.isinf(outputs(path, {"x": big, "y": big})[0]).all()


def palettized(codes: Array, codebook: Array, bits: int, name: str, **keywords: int) -> Var:
    indices = mb.const(val=codes.astype(CODES[bits]), name=f"{name}_codes")
    lut = mb.const(val=codebook, name=f"{name}_codebook")
    indices.op.weight_id, lut.op.weight_id = f"{name}_codes", f"{name}_codebook"
    return mb.constexpr_lut_to_dense(indices=indices, lut=lut, name=name, **keywords)


def random_palette(
    shape: tuple[int, ...], bits: int, groups: tuple[int, ...] | None = None, width: int = 1, seed: int = 0
) -> Palette:
    codes = generator(seed).integers(0, 2**bits, shape).astype(np.uint8)
    return codes, half(*(groups or [1] * len(shape)), 2**bits, width, seed=seed + 1)


def materialized(path: Path, name: str) -> tuple[Any, Array]:
    """A palettized constant as coremltools' own reader sees it."""
    model = ct.models.MLModel(str(path), skip_model_load=True)
    program = milproto_load(model.get_spec(), model.get_spec().specificationVersion, model.weights_dir)
    operation = next(op for op in program.functions["main"].operations if op.outputs[0].name == name)
    return operation, operation.materialized_val_inference()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_palettized_conv(tmp_path: Path, bits: int) -> None:
    codes, codebook = random_palette((6, 8, 1, 1), bits)
    x = half(1, 8, 1, 5, seed=9)
    path = save(
        tmp_path / "p.mlpackage",
        main=function(lambda x: mb.conv(x=x, weight=palettized(codes, codebook, bits, "w")), x=x),
    )
    package = Package.open(path)
    ((_, name, weight),) = package.read_compressed_weights()
    operation, dense = materialized(path, "w")
    assert name == "w" and weight.codes.dtype == np.uint8
    assert weight.codebook is not None and weight.codebook.dtype == np.float16
    np.testing.assert_array_equal(weight.codes, codes)
    np.testing.assert_array_equal(weight.codes, operation.indices.val.astype(np.uint8))
    np.testing.assert_array_equal(weight.codebook, codebook)
    exact = np.einsum("oi,ist->ost", dense[:, :, 0, 0].astype(float), x[0].astype(float))[None]
    assert_rounded(package.run({"x": x})["y0"].numpy(), exact, ulps=2)


@pytest.mark.parametrize(
    ("groups", "width", "axis"),
    [
        ((1, 1), 1, None),
        ((8, 1), 1, None),
        ((1, 3), 1, None),
        ((4, 2), 1, None),
        ((1, 1), 2, 0),
        ((1, 1), 4, 1),
    ],
)
def test_codebook_groups_and_vectors(
    tmp_path: Path, groups: tuple[int, ...], width: int, axis: int | None
) -> None:
    codes, codebook = random_palette((8, 6), 2, groups, width)
    x = half(3, 6 * (width if axis == 1 else 1))
    keywords = {} if axis is None else {"vector_axis": axis}

    def body(x: Var) -> tuple[Var, ...]:
        weight = palettized(codes, codebook, 2, "w", **keywords)
        return (
            mb.linear(x=x, weight=weight),
            mb.identity(x=weight),
            mb.gather(x=weight, indices=[7, 0, 3], axis=0),
        )

    path = save(tmp_path / "p.mlpackage", main=function(body, x=x))
    product, stored, rows = outputs(path, {"x": x})
    _, dense = materialized(path, "w")
    np.testing.assert_array_equal(stored, dense)
    np.testing.assert_array_equal(rows, dense[[7, 0, 3]])
    assert_rounded(product, x.astype(float) @ dense.T.astype(float), ulps=4)


def test_scaled_constants_chain(tmp_path: Path) -> None:
    """int8 codebooks scaled to fp16, and int4 blocks with offsets."""
    codes, _ = random_palette((4, 16), 4)
    entries = generator(5).integers(-128, 128, (1, 1, 16, 1)).astype(np.int8)
    scale = np.full((1, 1, 1, 1), 0.01, np.float16)
    data = generator(6).integers(-8, 8, (4, 16)).astype(types.np_int4_dtype)
    offset = generator(7).integers(-8, 8, (2, 4)).astype(types.np_int4_dtype)
    scales = half(2, 4)
    x = half(3, 16)

    def body(x: Var) -> tuple[Var, ...]:
        lut = mb.constexpr_blockwise_shift_scale(data=entries, scale=scale)
        indices = mb.const(val=codes.astype(CODES[4]))
        blocks = mb.constexpr_blockwise_shift_scale(data=data, scale=scales, offset=offset)
        dense = mb.constexpr_lut_to_dense(indices=indices, lut=lut)
        return dense, blocks, mb.linear(x=x, weight=blocks)

    dense, blocks, product = outputs(save(tmp_path / "p.mlpackage", main=function(body, x=x)), {"x": x})
    assert_rounded(dense, (scale * entries.astype(float)).reshape(-1)[codes])
    spread = [np.repeat(np.repeat(v.astype(float), 2, 0), 4, 1) for v in (scales, offset)]
    assert_rounded(blocks, spread[0] * (data.astype(float) - spread[1]))
    assert_rounded(product, x.astype(float) @ blocks.T.astype(float), ulps=4)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_embedding_with_enumerated_shapes(tmp_path: Path, bits: int | None) -> None:
    codes, codebook = random_palette((50, 8), bits or 4)
    table = half(50, 8) if bits is None else codebook.reshape(-1)[codes]
    symbol = get_new_symbol()

    def body(input_ids: Var) -> Var:
        x = table if bits is None else palettized(codes, codebook, bits, "w")
        return mb.gather(x=x, indices=input_ids, axis=0, validate_indices=False)

    shapes = ct.EnumeratedShapes([[1, 1], [1, 4]], default=[1, 1])
    path = save(
        tmp_path / "p.mlpackage",
        [ct.TensorType("input_ids", shape=shapes, dtype=np.int32)],
        main=function(body, input_ids=mb.placeholder((1, symbol), dtype=types.int32)),
    )
    package = Package.open(path)
    spec = package.functions["main"]
    assert spec.inputs[0].shape == (1, None) and spec.enumerated == {"input_ids": ((1, 1), (1, 4))}
    for ids in ([[7]], [[0, 49, 3, 3]]):
        got = package.run({"input_ids": np.array(ids, np.int32)})["y0"].numpy()
        np.testing.assert_array_equal(got, table[ids])
    for ids in ([[1, 2]], [[50]]):
        with pytest.raises(InputError, match=r"input_ids|gather"):
            package.run({"input_ids": np.array(ids, np.int32)})


HEADS, KV_HEADS, SIZE, WIDTH, CONTEXT, BATCH, LAYERS = 4, 2, 8, 32, 16, 4, 2


def attention_weights() -> dict[str, Palette]:
    rows = {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * SIZE, "o": WIDTH}
    return {
        f"{name}{layer}": random_palette((size, WIDTH, 1, 1), 4, seed=10 * layer + i)
        for layer in range(LAYERS)
        for i, (name, size) in enumerate(rows.items())
    }


def attention(tokens: int, weights: Mapping[str, Palette], layers: Iterable[int]) -> Function:
    """A pre-norm attention stack over a KV cache, `tokens` at a time, as (1, WIDTH, 1, tokens)."""

    def project(x: Var, name: str) -> Var:
        codes, codebook = weights[name]
        y = mb.conv(x=x, weight=palettized(codes, (codebook / 8).astype(np.float16), 4, name))
        return mb.mul(x=y, y=np.float16(0.5))

    def heads(x: Var, count: int) -> Var:
        return mb.transpose(x=mb.reshape(x=x, shape=[1, count, SIZE, tokens]), perm=[0, 1, 3, 2])

    def body(hidden: Var, mask: Var, position: Var, kv_cache: Var) -> Var:
        end = mb.add(x=position, y=np.array([tokens], np.int32))
        x = hidden
        for layer in layers:
            twice = mb.concat(values=[x, mb.mul(x=x, y=np.float16(-1))], axis=1)
            normed = mb.layer_norm(x=twice, axes=[1], epsilon=np.float16(1e-5))
            normed = mb.slice_by_size(x=normed, begin=[0, 0, 0, 0], size=[1, WIDTH, 1, tokens])
            cache = mb.read_state(input=kv_cache)
            parts = []
            for row, name in ((layer, "k"), (layer + LAYERS, "v")):
                begin = mb.concat(values=[[row], [0], position, [0]], axis=0)
                stop = mb.concat(values=[[row + 1], [0], end, [0]], axis=0)
                cache = mb.slice_update(
                    x=cache,
                    update=heads(project(normed, f"{name}{layer}"), KV_HEADS),
                    begin=begin,
                    end=stop,
                    begin_mask=[False, True, False, True],
                    end_mask=[False, True, False, True],
                )
                cache = mb.coreml_update_state(state=kv_cache, value=cache)
                part = mb.slice_by_size(x=cache, begin=[row, 0, 0, 0], size=[1, KV_HEADS, CONTEXT, SIZE])
                part = mb.tile(x=mb.expand_dims(x=part, axes=[2]), reps=[1, 1, HEADS // KV_HEADS, 1, 1])
                parts.append(mb.reshape(x=part, shape=[1, HEADS, CONTEXT, SIZE]))
            q = mb.mul(x=heads(project(normed, f"q{layer}"), HEADS), y=np.float16(SIZE**-0.5))
            scores = mb.add(x=mb.matmul(x=q, y=parts[0], transpose_y=True), y=mask)
            mixed = mb.matmul(x=mb.softmax(x=scores, axis=-1), y=parts[1])
            mixed = mb.reshape(x=mb.transpose(x=mixed, perm=[0, 1, 3, 2]), shape=[1, WIDTH, 1, tokens])
            x = mb.add(x=x, y=project(mixed, f"o{layer}"))
        return x

    return function(
        body,
        hidden=np.empty((1, WIDTH, 1, tokens), np.float16),
        mask=np.empty((1, 1, tokens, CONTEXT), np.float16),
        position=T1,
        kv_cache=mb.state_tensor_placeholder((2 * LAYERS, KV_HEADS, CONTEXT, SIZE), dtype=types.fp16),
    )


def reference_attention(x: Array, weights: Mapping[str, Palette]) -> Array:
    """The same stack in float64, the whole sequence at once, without a cache; x is (WIDTH, tokens)."""
    tokens = x.shape[1]
    causal = np.where(np.tril(np.ones((tokens, tokens), bool)), 0, -np.inf)

    def project(x: Array, name: str) -> Array:
        codes, codebook = weights[name]
        return 0.5 * (codebook / 8).astype(np.float16).astype(float).reshape(-1)[codes[:, :, 0, 0]] @ x

    for layer in range(LAYERS):
        normed = x / np.sqrt((x**2).mean(0) + 1e-5)
        q, k, v = (project(normed, f"{name}{layer}").reshape(-1, SIZE, tokens) for name in "qkv")
        k, v = (np.repeat(part, HEADS // KV_HEADS, 0) for part in (k, v))
        scores = np.einsum("hdt,hds->hts", q, k) / math.sqrt(SIZE) + causal
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = x + project(np.einsum("hts,hds->hdt", scores, v).reshape(WIDTH, tokens), f"o{layer}")
    return x


def decode(run: Run, hidden: Array) -> Array:
    """Two prefills of BATCH tokens, then one token at a time."""
    results, position = [], 0
    for count, name in ((BATCH, "prefill"), (BATCH, "prefill"), *[(1, "infer")] * 3):
        rows = position + np.arange(count)[:, None]
        mask = np.where(np.arange(CONTEXT) <= rows, 0, -1e4).astype(np.float16)[None, None]
        inputs: dict[str, Array] = {"mask": mask, "position": np.array([position], np.int32)}
        results.append(run(hidden[..., position : position + count], inputs, name))
        position += count
    return np.concatenate(results, -1)


def test_attention_with_a_state_shared_by_functions_and_packages(tmp_path: Path) -> None:
    weights = attention_weights()

    def package(name: str, layers: Iterable[int]) -> Package:
        functions = {"infer": attention(1, weights, layers), "prefill": attention(BATCH, weights, layers)}
        return Package.open(save(tmp_path / f"{name}.mlpackage", **functions))

    whole = package("whole", range(LAYERS))
    chunks = [package(f"chunk{layer}", [layer]) for layer in range(LAYERS)]
    hidden = half(1, WIDTH, 1, 2 * BATCH + 3, seed=77)
    expected = reference_attention(hidden[0, :, 0].astype(float), weights)
    results = []
    for packages in ([whole], chunks):
        state = packages[0].new_state()

        def run(
            x: Array,
            inputs: dict[str, Array],
            name: str,
            packages: list[Package] = packages,
            state: dict[str, Tensor] = state,
        ) -> Array:
            for part in packages:
                x = part.run({"hidden": x, **inputs}, state, function=name)["y0"].numpy()
            return x[0, :, 0]

        results.append(decode(run, hidden))
        assert (
            np.count_nonzero(state["kv_cache"][:, :, : 2 * BATCH + 3])
            and state["kv_cache"][:, :, -1].eq(0).all()
        )
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - expected).max() <= 8 * 2.0**-11 * np.abs(expected).max()
    assert whole.default_function == "infer"
    places = [(name, weight.place) for _, name, weight in whole.read_compressed_weights()]
    assert len(places) == 2 * len(set(places)) == 2 * len(weights)


def test_updates_in_place_never_show(tmp_path: Path) -> None:
    """Old contents of a state, of a constant and of an input survive a slice_update that has users left."""
    ones = np.ones((4, 8), np.float16)

    def body(x: Var, s: Var) -> tuple[Var, ...]:
        old = mb.read_state(input=s)
        row = mb.slice_by_size(x=old, begin=[1, 0], size=[1, 8])
        new = mb.slice_update(x=old, update=x, begin=[1, 0], end=[2, 8])
        still_old = mb.read_state(input=s)
        mb.coreml_update_state(state=s, value=new)
        twos = mb.slice_update(x=ones, update=x, begin=[0, 0], end=[1, 8])
        return row, new, still_old, twos, mb.slice_update(x=x, update=x, begin=[0, 0], end=[1, 8])

    state = mb.state_tensor_placeholder((4, 8), dtype=types.fp16)
    package = Package.open(save(tmp_path / "p.mlpackage", main=function(body, x=ones[:1], s=state)))
    states = package.new_state()
    expected = np.zeros((4, 8))
    for value in (2, 3):
        x = np.full((1, 8), value, np.float16)
        row, new, old, constant, same = (y.numpy() for y in package.run({"x": x}, states).values())
        np.testing.assert_array_equal(row[0], expected[1])
        np.testing.assert_array_equal(old, expected)
        expected[1] = value
        np.testing.assert_array_equal(new, expected)
        np.testing.assert_array_equal(states["s"].numpy(), expected)
        np.testing.assert_array_equal(constant[1:], ones[1:])
        assert (constant[0] == value).all() and (same == value).all() and (x == value).all()
    new += 1
    np.testing.assert_array_equal(states["s"].numpy(), expected)


@pytest.fixture(scope="module")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def body(x: Var, s: Var) -> Var:
        return mb.add(x=x, y=mb.coreml_update_state(state=s, value=x))

    state = mb.state_tensor_placeholder((2, 8), dtype=types.fp16)
    path = tmp_path_factory.mktemp("stateful") / "p.mlpackage"
    return save(path, main=function(body, x=np.empty((2, 8), np.float16), s=state))


GOOD = torch.ones(2, 8, dtype=torch.float16)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "missing input 'x'"),
        ({"x": GOOD, "z": GOOD}, "unknown input 'z'"),
        ({"x": GOOD[:1]}, "input 'x' has shape"),
        ({"x": GOOD.float()}, "input 'x' is torch.float32"),
    ],
)
def test_bad_inputs(stateful: Path, inputs: dict[str, Tensor], message: str) -> None:
    package = Package.open(stateful)
    with pytest.raises(InputError, match=message):
        package.run(inputs, package.new_state())


def test_bad_states_and_functions(stateful: Path) -> None:
    package = Package.open(stateful)
    for state, message in (
        (None, "missing state 's'"),
        ({}, "missing state 's'"),
        ({"s": GOOD[0]}, "state 's' has"),
    ):
        with pytest.raises(InputError, match=message):
            package.run({"x": GOOD}, state)
    with pytest.raises(InputError, match=r"no function 'mian'.*did you mean 'main'"):
        package.run({"x": GOOD}, package.new_state(), "mian")


def test_what_cannot_be_run_is_refused_at_opening(tmp_path: Path) -> None:
    def body(x: Var) -> Var:
        a = mb.erf(x=x, name="first")
        b = mb.cumsum(x=a, axis=0, name="second")
        kernel = half(4, 4, 2, 2)
        c = mb.conv(x=b, weight=kernel, pad_type="same", name="third")
        d = mb.gather(x=c, indices=np.zeros((1, 2), np.int32), axis=1, batch_dims=1, name="fourth")
        return mb.exp(x=mb.exp(x=d, name="fifth"), name="fifth")

    path = save(tmp_path / "p.mlpackage", main=function(body, x=half(1, 4, 5, 6)))
    with pytest.raises(UnsupportedError) as caught:
        Package.open(path)
    for part in (
        "erf 'first' in function 'main'",
        "cumsum 'second'",
        "conv 'third' in function 'main': pad_type=same",
        "gather 'fourth' in function 'main': batch_dims=1",
        "a second value named 'fifth'",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "x", "keywords"), [("real_div", M, {"y": M}), ("slice_by_index", A, BACKWARDS)]
)
def test_what_cannot_be_run_is_refused_when_running(
    tmp_path: Path, kind: str, x: Array, keywords: dict[str, Any]
) -> None:
    path = save(tmp_path / "p.mlpackage", main=function(lambda x: getattr(mb, kind)(x=x, **keywords), x=x))
    with pytest.raises(UnsupportedError, match=kind.split("_", maxsplit=1)[0]):
        Package.open(path).run({"x": x})


@pytest.mark.parametrize("begin", [15, 17])
def test_a_write_past_the_end_is_an_error(tmp_path: Path, begin: int) -> None:
    def body(x: Var, at: Var) -> Var:
        return mb.slice_update(x=np.zeros(16, np.float16), update=x, begin=at, end=mb.add(x=at, y=T2))

    path = save(tmp_path / "p.mlpackage", main=function(body, x=half(2), at=T1))
    with pytest.raises(InputError, match="slice_update"):
        Package.open(path).run({"x": half(2), "at": np.array([begin], np.int32)})


@pytest.mark.parametrize("name", ["../model.mlmodel", "/etc/passwd", "a\\b", "c:/model", "", "a/../../b", 3])
def test_a_manifest_cannot_leave_the_package(stateful: Path, tmp_path: Path, name: object) -> None:
    manifest = json.loads((stateful / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = name
    (tmp_path / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"leaves the package|does not name"):
        Package.open(tmp_path)


def test_damaged_packages(tmp_path: Path) -> None:
    codes, codebook = random_palette((64, 64, 1, 1), 8)
    body = function(lambda x: mb.conv(x=x, weight=palettized(codes, codebook, 8, "w")), x=half(1, 64, 1, 1))
    path = save(tmp_path / "p.mlpackage", main=body)
    folder = path / "Data/com.apple.CoreML"
    weights = (folder / "weights/weight.bin").read_bytes()
    for content in (weights[:200], b"", None):
        (folder / "weights/weight.bin").unlink()
        if content is not None:
            (folder / "weights/weight.bin").write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read a .* constant|weight.bin"):
            Package.open(path).run({"x": half(1, 64, 1, 1)})
        (folder / "weights/weight.bin").write_bytes(weights)
    (folder / "model.mlmodel").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="model file is damaged"):
        Package.open(path)
    (folder / "model.mlmodel").unlink()
    with pytest.raises(InputError, match="model file is missing"):
        Package.open(path)
    with pytest.raises(InputError, match="not a Core ML package"):
        Package.open(Path(tmp_path / "nowhere"))
