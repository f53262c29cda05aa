"""Rounded activations, integer weights, online rotations and scales of groups, as packages and as they run.

References: integers in numpy, dense Hadamard matrices, coremltools' own reader, and the checkpoint in
transformers (through `verify_packages`).
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Quantized
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.models import MLModel

from anequant.calibration.ranges import LayerRange, measure_ranges
from anequant.checkpoints.layers import load_layer, open_quantized
from anequant.checkpoints.reader import open_checkpoint
from anequant.errors import UnsupportedError, UsageError, VerificationError
from anequant.jobs.control import silent
from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
from anequant.quantization.codebook import lloyd_max, make_uniform_codebook, round_to_integers
from anequant.quantization.online import plan_online
from anequant.recipe_files import load_recipe
from anequant.reference.forward import ReferenceModel
from anequant.request import LowerRequest
from anequant.rotation.hadamard import hadamard
from anequant.rotation.orthogonal import make_plain_hadamard
from anequant.targets.coreml.interpreter.integers import integer_conv
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.lint.lint import lint
from anequant.targets.coreml.lowerable import check_lowering
from anequant.targets.coreml.meta import read_meta
from anequant.targets.coreml.program.online_rotations import emit_weights, rotate_channels
from anequant.targets.coreml.program.package import MODEL_FILE, save_package
from anequant.targets.coreml.program.program import build_program
from anequant.targets.coreml.storage import read_model
from anequant.targets.coreml.toolkit import TARGET, Function, mb, types
from anequant.targets.shared.agreement import compare_rounding
from anequant.targets.shared.headroom import plan_headroom
from anequant.targets.shared.packed_codes import split_codebook
from anequant.targets.shared.rotation_weights import WIDEST, make_hadamard_weights
from anequant.verification.constants import verify_constants
from anequant.verification.verify import verify_packages

SIZES = LowerOptions(context=32, batch=16)
STATIC: dict[str, Any] = {"activation_bits": 8, "activation_scales": "static"}
Array = np.ndarray[Any, Any]


def saved(folder: Path, body: Callable[[Any], list[Any]], shape: tuple[int, ...]) -> Package:
    """A program of `body` over x, float16 of this shape."""
    with Function({"x": mb.placeholder(shape, dtype=types.fp16)}, opset_version=TARGET) as function:
        function.set_outputs(
            [mb.identity(x=value, name=f"y{i}") for i, value in enumerate(body(function.inputs["x"]))]
        )
    save_package(build_program({"main": function}), folder / "p.mlpackage", {})
    return Package.open(folder / "p.mlpackage")


def run(package: Package, x: Array) -> list[Array]:
    return [value.numpy() for value in package.run({"x": x}).values()]


def operations(package: Path) -> list[Any]:
    """What coremltools' own reader finds in all functions."""
    model = MLModel(str(package), skip_model_load=True)
    program = load_program(model.get_spec(), model.get_spec().specificationVersion, model.weights_dir)
    return [operation for function in program.functions.values() for operation in function.operations]


# --- single operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.25, 0.0137, 3.0])
@pytest.mark.parametrize(("dtype", "zero"), [("int8", None), ("int8", 5), ("uint8", 100)])
def test_quantize_rounds_to_even_and_saturates(
    tmp_path: Path, scale: float, dtype: str, zero: int | None
) -> None:
    """Every half step around zero and beyond both ends, and the way back."""
    step = np.float16(scale)
    halves = np.arange(-700, 701) * (float(step) / 2)
    x = np.concatenate([halves, np.random.default_rng(0).normal(size=647) * 80 * scale]).astype(np.float16)
    point: dict[str, Any] = {} if zero is None else {"zero_point": np.dtype(dtype).type(zero)}

    def body(x: Any) -> list[Any]:
        codes = mb.quantize(input=x, scale=step, output_dtype=dtype, **point)
        return [mb.cast(x=codes, dtype="int32"), mb.dequantize(input=codes, scale=step, **point)]

    codes, back = run(saved(tmp_path, body, (1, 2, 1, 1024)), x.reshape(1, 2, 1, 1024))
    ends = np.iinfo(dtype)
    exact = np.rint(x.astype(np.float64) / float(step)) + (zero or 0)
    expected = np.clip(exact, ends.min, ends.max).reshape(codes.shape)
    np.testing.assert_array_equal(codes, expected)
    assert {ends.min, ends.max} <= set(codes.reshape(-1).tolist())
    np.testing.assert_array_equal(back, ((expected - (zero or 0)) * float(step)).astype(np.float16))


def test_quantize_with_scales_along_an_axis(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(1, 3, 2, 5)).astype(np.float16)
    scales = np.array([0.01, 0.02, 0.5], np.float16)

    def body(x: Any) -> list[Any]:
        codes = mb.quantize(input=x, scale=scales, axis=-3, output_dtype="int8")
        return [mb.dequantize(input=codes, scale=scales, axis=1)]

    (back,) = run(saved(tmp_path, body, x.shape), x)
    wide = scales.astype(np.float64).reshape(1, 3, 1, 1)
    codes = np.clip(np.rint(x / wide), -128, 127)
    np.testing.assert_array_equal(back, (codes * wide).astype(np.float16))


def conv_of_integers(form: str, scale: Array, **options: Any) -> Callable[[Any], list[Any]]:
    """conv of an x rounded by 0.0137 and integers from -128 to 127, held as `form`."""
    entries = np.linspace(-128, 127, 16).round().astype(np.int8)
    codes = np.random.default_rng(2).integers(0, 16, WEIGHT).astype(np.uint8)
    codes[0] = 0

    def body(x: Any) -> list[Any]:
        data: Any = entries[codes]
        if form == "lut":
            table = entries.reshape(1, 1, 1, 1, 16, 1)
            data = mb.constexpr_lut_to_dense(indices=codes.astype(types.np_uint4_dtype), lut=table)
        weight = mb.constexpr_blockwise_shift_scale(data=data, scale=scale)
        step = np.float16(0.0137)
        rounded = mb.dequantize(input=mb.quantize(input=x, scale=step, output_dtype="int8"), scale=step)
        return [mb.conv(x=rounded, weight=weight, **options)]

    return body


WEIGHT = (3, 1500, 1, 1)
ONE, ROWS = np.full((1, 1, 1, 1), 2.0**-14, np.float16), np.array([1, 3, 7], np.float16).reshape(3, 1, 1, 1)


@pytest.mark.parametrize("form", ["int8", "lut"])
@pytest.mark.parametrize("scale", [ONE, ROWS * np.float16(2.0**-16)], ids=["tensor", "rows"])
def test_a_convolution_of_integers_is_exact(tmp_path: Path, form: str, scale: Array) -> None:
    """Sums beyond 2^24, where float32 has no odd numbers, and one bias; then all is scaled once."""
    bias = np.array([0.5, -2, 3], np.float16)
    package = saved(tmp_path, conv_of_integers(form, scale, bias=bias), (1, 1500, 1, 4))
    x = (np.random.default_rng(3).normal(size=(1, 1500, 1, 4)) * 0.5).astype(np.float16)
    x[..., 0] = -100
    (_, _, weight), *_ = package.read_compressed_weights()
    integers = weight.codes if weight.codebook is None else weight.codebook.reshape(-1)[weight.codes]
    step = float(np.float16(0.0137))
    codes = np.clip(np.rint(x.astype(np.float64) / step), -128, 127).astype(np.int64)
    sums = np.einsum("oi,is->os", integers[:, :, 0, 0].astype(np.int64), codes[0, :, 0])
    assert np.abs(sums).max() > 2**24 and set(sums[:, 1:].reshape(-1) % 2) == {0, 1}
    scales = scale.reshape(-1, 1).astype(np.float64) * step
    expected = (sums * scales + bias[:, None].astype(np.float64)).astype(np.float16)
    (got,) = run(package, x)
    np.testing.assert_array_equal(got[0, :, 0], expected)
    exact = integer_conv(
        torch.from_numpy(codes).float(),
        torch.tensor(step),
        torch.from_numpy(integers).float(),
        torch.from_numpy(scale).float(),
    )
    np.testing.assert_array_equal(exact[0, :, 0], (sums * scales).astype(np.float32))


def test_integers_that_cancel_leave_nothing(tmp_path: Path) -> None:
    """100 * 63 = 90 * 70, which the float16 values of 100 and 90 steps do not know."""
    step = np.float16(0.0137)
    x = (np.array([100, 90]) * step.astype(np.float64)).astype(np.float16).reshape(1, 2, 1, 1)
    weight = np.array([63, -70], np.int8).reshape(1, 2, 1, 1)

    def body(x: Any) -> list[Any]:
        codes = mb.quantize(input=x, scale=step, output_dtype="int8")
        back = mb.dequantize(input=codes, scale=step)
        scaled = mb.constexpr_blockwise_shift_scale(data=weight, scale=ONE)
        return [mb.conv(x=back, weight=scaled)]

    assert run(saved(tmp_path, body, x.shape), x)[0].item() == 0
    assert run(Package.open(tmp_path / "p.mlpackage", rounding=False), x)[0].item() != 0


def test_a_convolution_of_integers_in_groups_and_windows(tmp_path: Path) -> None:
    x = np.random.default_rng(4).normal(size=(1, 4, 6, 6)).astype(np.float16)
    weight = np.random.default_rng(5).integers(-128, 128, (2, 2, 3, 3)).astype(np.int8)

    def body(x: Any) -> list[Any]:
        codes = mb.quantize(input=x, scale=np.float16(0.03), output_dtype="int8")
        rounded = mb.dequantize(input=codes, scale=np.float16(0.03))
        return [
            mb.conv(x=rounded, weight=mb.constexpr_blockwise_shift_scale(data=weight, scale=ONE), groups=2)
        ]

    (got,) = run(saved(tmp_path, body, x.shape), x)
    step = float(np.float16(0.03))
    codes = torch.from_numpy(np.rint(x.astype(np.float64) / step)).clamp(-128, 127)
    sums = torch.nn.functional.conv2d(codes, torch.from_numpy(weight).double(), groups=2)
    np.testing.assert_array_equal(got, (sums * step * 2.0**-14).numpy().astype(np.float16))


def test_without_rounding_the_same_program_is_one_of_floats(tmp_path: Path) -> None:
    saved(tmp_path, conv_of_integers("lut", ONE), (1, 1500, 1, 4))
    package = Package.open(tmp_path / "p.mlpackage", rounding=False)
    x = np.random.default_rng(6).normal(size=(1, 1500, 1, 4)).astype(np.float16)
    (_, _, weight), *_ = package.read_compressed_weights()
    assert weight.codebook is not None
    dense = weight.codebook.reshape(-1)[weight.codes][:, :, 0, 0].astype(np.float64) * 2.0**-14
    expected = np.einsum("oi,is->os", dense, x[0, :, 0].astype(np.float64))
    np.testing.assert_allclose(run(package, x)[0][0, :, 0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("width", "order"), [(896, 896), (4864, 4864), (18944, 18944), (4864, 64), (512, 8)])
def test_the_factors_are_the_hadamard_matrix(tmp_path: Path, width: int, order: int) -> None:
    """Two unit vectors and two random ones through a saved program, against the matrix itself."""
    rotation = make_plain_hadamard(width, order)
    weights = make_hadamard_weights(rotation, width)
    package = saved(
        tmp_path, lambda x: [rotate_channels(x, emit_weights(weights, "r"), "x")], (1, width, 1, 4)
    )
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).half()
    x[:2] = 0
    x[0, 1] = x[1, width - 2] = 1
    got = torch.from_numpy(run(package, x.T.reshape(1, width, 1, 4).numpy())[0])[0, :, 0].T.double()
    if order <= 896:
        dense = torch.block_diag(*[hadamard(order).double() / order**0.5] * (width // order))
        expected = x.double() @ dense
    else:
        expected = rotation.apply(x.double())
    assert float((got - expected).abs().max()) <= 2e-3 * float(expected.abs().max())
    assert torch.equal(got[:2].sign(), expected[:2].sign())
    shapes = [value.shape for op in operations(tmp_path / "p.mlpackage") for value in op.outputs]
    assert max(len(shape) for shape in shapes) == 4
    convolutions = [op for op in operations(tmp_path / "p.mlpackage") if op.op_type == "conv"]
    assert len(convolutions) == len(weights) == (1 if order <= WIDEST else 2)
    assert all(op.weight.shape[1] <= WIDEST for op in convolutions)
    if order < width:
        assert [int(op.groups.val) for op in convolutions] == [width // order]


WIDTHS = [4864, 8960, 11008, 18944, 27648, 29568, 3072, 6144, 9728, 12288, 17408, 25600, 8192, 14336, 28672]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_published_width_has_small_factors(width: int) -> None:
    """Of orthonormal rows, up to the rounding of their one magnitude to float16."""
    weights = make_hadamard_weights(make_plain_hadamard(width, width), width)
    assert math.prod(weight.shape[1] for weight in weights) == width
    for weight in weights:
        size = weight.shape[1]
        assert size <= 344 and weight.shape[0] % size == 0 and width % weight.shape[0] == 0
        rows = weight[:size, :, 0, 0].double()
        assert torch.allclose(rows @ rows.T, torch.eye(size, dtype=torch.float64), atol=2.0**-10)


def test_all_integers_of_8_bits_stay_what_they_are() -> None:
    for step in (1.0, 2.0**-5, 4.0):
        codebook = make_uniform_codebook(8) * step
        assert torch.equal(round_to_integers(codebook), codebook)
        entries, found = split_codebook(codebook, "some")
        assert found == step and torch.equal(entries.float(), make_uniform_codebook(8))


def test_a_free_codebook_is_not_made_of_integers() -> None:
    codebook = lloyd_max(torch.randn(5000, generator=torch.Generator().manual_seed(0)), 4)
    with pytest.raises(UnsupportedError, match="the codebook of 'some' is not 8-bit integers"):
        split_codebook(codebook, "some")
    entries, step = split_codebook(round_to_integers(codebook), "some")
    assert entries.dtype == torch.int8 and torch.equal(entries.float() * step, round_to_integers(codebook))


# --- whole models ---------------------------------------------------------------------------------------


def lowered(
    quantize_model: Callable[..., Quantized], model: Path, folder: Path, **recipe: Any
) -> tuple[Path, Path, Counter[str]]:
    """Checkpoint, packages, and how many of each operation coremltools reads in the chunk."""
    checkpoint = quantize_model(model, "w4-nearest", **recipe).folder
    lower(LowerRequest(checkpoint, SIZES), folder / "out")
    (chunk,) = read_meta(folder / "out").chunk_names
    counts: Counter[str] = Counter()
    for operation in operations(folder / "out" / f"{chunk}.mlpackage"):
        counts[operation.op_type] += 1
        if operation.op_type == "constexpr_lut_to_dense":
            counts[f"lut of {operation.lut.val.dtype}"] += 1
        if operation.op_type == "constexpr_blockwise_shift_scale" and operation.data.val is not None:
            counts[f"integers of {operation.data.val.dtype}"] += 1
        if operation.op_type == "conv" and int(operation.groups.val) > 1:
            counts["grouped conv"] += 1
    return checkpoint, folder / "out", counts


LAYERS, FUNCTIONS, LINEARS = 2, 2, 7
EACH = LAYERS * FUNCTIONS
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "R3": (
        "qwen3",
        {"r3": "hadamard"},
        {"grouped conv": 2 * EACH, "conv": (LINEARS + 2) * EACH, "lut of float16": LINEARS * EACH},
    ),
    "R4 in blocks": (
        "qwen2",
        {"r4": "block-hadamard", "r4_block": 32},
        {"grouped conv": EACH, "conv": (LINEARS + 1) * EACH, "quantize": 0},
    ),
    "R4 whole": ("llama", {"r4": "hadamard"}, {"conv": (LINEARS + 2) * EACH, "grouped conv": EACH}),
    "W4A8": (
        "llama",
        STATIC,
        {
            "quantize": LINEARS * EACH,
            "dequantize": LINEARS * EACH,
            "lut of int8": LINEARS * EACH,
            "lut of float16": 0,
            "constexpr_blockwise_shift_scale": LINEARS * EACH,
        },
    ),
    "W8A8": (
        "qwen2",
        {**STATIC, "bits": 8, "codebook": "uniform", "smooth": 0.5},
        {
            "quantize": LINEARS * EACH,
            "integers of int8": LINEARS * EACH,
            "constexpr_blockwise_shift_scale": LINEARS * EACH,
            "constexpr_lut_to_dense": 0,
        },
    ),
    "all, but some stay float": (
        "qwen3",
        {**STATIC, "r3": "hadamard", "r4": "hadamard", "activation_overrides": "down_proj=16,o_proj=16"},
        {
            "quantize": 5 * EACH,
            "dequantize": 5 * EACH,
            "lut of int8": 5 * EACH,
            "lut of float16": 2 * EACH,
            "grouped conv": 3 * EACH,
        },
    ),
}
CONFIG = {"vocab_size": 112, "intermediate_size": 320, "num_hidden_layers": 2}
"""320 = 20 * 16 channels take two factors; blocks of 32 divide them."""


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_model(folder / kind, kind, False, **CONFIG) for kind in ("llama", "qwen2", "qwen3")}


@pytest.mark.parametrize("case", CASES)
def test_packages_do_what_the_checkpoint_does(
    models: dict[str, Path], quantize_model: Callable[..., Quantized], tmp_path: Path, case: str
) -> None:
    kind, recipe, expected = CASES[case]
    checkpoint, packages, counts = lowered(quantize_model, models[kind], tmp_path, **recipe)
    assert {name: counts[name] for name in expected} == expected
    check = verify_packages(packages, checkpoint)
    assert check.weights == LAYERS * LINEARS
    assert check.agreement + check.ties / check.positions >= 0.99 and check.relative_error <= 1e-2
    assert (check.rounding is not None) == bool(open_checkpoint(checkpoint).online.activations)
    findings = lint(packages)
    assert {finding.rule for finding in findings} <= {"D4", "N3", "S3", "Q1"}
    assert not [finding for finding in findings if finding.severity == "error"]
    assert {finding.rule for finding in lint(packages, "a17")} <= {"D4", "N3", "S3"}


def test_the_bundled_model_with_everything(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], tmp_path: Path
) -> None:
    checkpoint, packages, counts = lowered(
        quantize_model, tiny_qwen2, tmp_path, **STATIC, r3="hadamard", r4="block-hadamard", smooth=0.3
    )
    assert counts["quantize"] == counts["dequantize"] == counts["lut of int8"] == 4 * LINEARS * FUNCTIONS
    check = verify_packages(packages, checkpoint)
    assert check.relative_error <= 5e-3 and check.rounding is not None and 0 < check.rounding <= math.sqrt(2)


# --- what verify finds ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(
    models: dict[str, Path],
    quantize_model: Callable[..., Quantized],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    recipe = {**STATIC, "r3": "hadamard", "r4": "block-hadamard", "r4_block": 32}
    return lowered(quantize_model, models["qwen3"], tmp_path_factory.mktemp("rounded"), **recipe)[:2]


def changed_scale(block: Any, kind: str, name: str) -> None:
    """Twice the scale of the first operation of a kind."""
    operation = next(item for item in block.operations if item.type == kind)
    binding = operation.inputs[name].arguments[0]
    value = binding.value
    if binding.WhichOneof("binding") == "name":
        made = next(
            item for item in block.operations if item.outputs and item.outputs[0].name == binding.name
        )
        value = made.attributes["val"]
    tensor = value.immediateValue.tensor
    tensor.bytes.values = (np.frombuffer(tensor.bytes.values, np.float16) * 3).tobytes()


def without_rounding(block: Any) -> None:
    rounding = {item.outputs[0].name: item for item in block.operations if item.type == "quantize"}
    back = next(item for item in block.operations if item.type == "dequantize")
    source = rounding[back.inputs["input"].arguments[0].name].inputs["input"].arguments[0].name
    for item in block.operations:
        for given in item.inputs.values():
            for binding in given.arguments:
                if binding.name == back.outputs[0].name:
                    binding.name = source


def unturned(block: Any) -> None:
    """The first layer's R4 is skipped."""
    turn = next(item for item in block.operations if item.type == "conv" and "r4" in item.outputs[0].name)
    turn.type = "identity"
    for name in [name for name in turn.inputs if name != "x"]:
        del turn.inputs[name]


DAMAGE: dict[str, tuple[Callable[[Any], None], str]] = {
    "quantize": (lambda block: changed_scale(block, "quantize", "scale"), "is rounded by"),
    "dequantize": (lambda block: changed_scale(block, "dequantize", "scale"), "is rounded by"),
    "weight": (
        lambda block: changed_scale(block, "constexpr_blockwise_shift_scale", "scale"),
        "has not the (checkpoint's one|same) codebook",
    ),
    "no rounding": (without_rounding, "is rounded by nothing"),
    "no R4": (unturned, "the online rotations have the factors"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_verify_compares_the_constants_that_run(
    rounded: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    checkpoint, packages = rounded
    copy = Path(shutil.copytree(packages, tmp_path / "copy"))
    assert verify_constants(copy, open_quantized(checkpoint), silent) == LAYERS * LINEARS
    (chunk,) = read_meta(copy).chunk_names
    file = copy / f"{chunk}.mlpackage" / MODEL_FILE
    model = read_model(file)
    damage, message = DAMAGE[case]
    function = model.mlProgram.functions["prefill"]
    damage(function.block_specializations[function.opset])
    file.write_bytes(model.SerializeToString())
    with pytest.raises(VerificationError, match=message):
        verify_constants(copy, open_quantized(checkpoint), silent)


def test_logits_further_apart_than_rounding_takes_them_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, first, second = (torch.randn(20, 50, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = plain + 0.1 * first
    assert compare_rounding(plain + 0.1 * second, expected, plain, "here") == pytest.approx(2**0.5, rel=0.1)
    with pytest.raises(VerificationError, match=r"by 3\.\d\d times what rounding does"):
        compare_rounding(plain + 0.3 * second, expected, plain, "here")


# --- headroom ---------------------------------------------------------------------------------------------


def test_ranges_see_both_sides_of_r4(
    models: dict[str, Path], quantize_model: Callable[..., Quantized]
) -> None:
    recipe = {**STATIC, "r4": "block-hadamard", "r4_block": 32, "activation_range": "percentile"}
    checkpoint = open_quantized(quantize_model(models["llama"], "w4-nearest", **recipe).folder)
    online, tokens = checkpoint.online, torch.arange(32)[None] % 97
    assert online.r4 is not None
    (first, *_) = measure_ranges(checkpoint, tokens)
    tensors = {name: value.float() for name, value in checkpoint.layer(0).items()}
    hidden = checkpoint.read("model.embed_tokens.weight")[tokens].float()
    unturned = ReferenceModel(
        checkpoint.spec,
        torch.float32,
        replace(
            online, r4=None, activations={k: v for k, v in online.activations.items() if "down" not in k}
        ),
    )
    (gated,) = unturned.inputs(0, tensors, [hidden], "mlp.down_proj")
    norms = gated.view(-1, 32).square().sum(1).sqrt()
    assert first.turns == pytest.approx(float(norms.max()), rel=1e-5)
    assert first.products >= float(gated.abs().max())
    linear = load_layer(checkpoint, 0).linears["mlp.down_proj"]
    scale = online.activations["model.layers.0.mlp.down_proj"].scale
    assert scale is not None
    codes = (online.r4.apply(gated) * linear.input_scale / scale).round().clamp(-128, 127)
    sums = float((codes.abs() * scale @ linear.codebook[linear.codes.long()].abs().T).max())
    assert first.sums["mlp.down_proj"] == pytest.approx(sums, rel=1e-4)


def test_a_rotation_that_overflows_the_accumulator_is_refused() -> None:
    quiet = LayerRange(3, 1.0, 1.0, 1.0, {"mlp.down_proj": 1.0}, turns=32000.0)
    assert plan_headroom([quiet]).residual_scale == 1
    with pytest.raises(UnsupportedError, match=r"sums of an online rotation in layer 3 reach 3\.3e\+04"):
        plan_headroom([replace(quiet, turns=33000.0)])


# --- groups -----------------------------------------------------------------------------------------------

GROUPS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "4-bit integers": ({"codebook": "uniform", "group_size": 32}, {"integers of int8": LINEARS * EACH}),
    "8-bit integers": (
        {"codebook": "uniform", "bits": 8, "group_size": 64},
        {"integers of int8": LINEARS * EACH, "constexpr_lut_to_dense": 0},
    ),
    "free codebook": ({"codebook": "lut", "group_size": 64}, {"lut of float16": LINEARS * EACH}),
}


@pytest.mark.parametrize("case", GROUPS)
def test_scales_of_groups_are_inside_the_weight_and_leave_the_engine(
    models: dict[str, Path], quantize_model: Callable[..., Quantized], tmp_path: Path, case: str
) -> None:
    recipe, expected = GROUPS[case]
    checkpoint, packages, counts = lowered(
        quantize_model, models["qwen2"], tmp_path, scales="group", r4="block-hadamard", **recipe
    )
    assert {name: counts[name] for name in expected} == expected
    (chunk,) = read_meta(packages).chunk_names
    found = operations(packages / f"{chunk}.mlpackage")
    scaled = [item for item in found if item.op_type == "constexpr_blockwise_shift_scale"]
    assert len(scaled) == LINEARS * EACH
    for item in scaled:
        rows, columns = item.outputs[0].shape[:2]
        assert item.scale.shape == (rows, columns // recipe["group_size"], 1, 1)
        if case == "4-bit integers":
            assert item.data.dtype == types.int4
    check = verify_packages(packages, checkpoint)
    assert check.weights == LAYERS * LINEARS and check.relative_error <= 1e-2
    errors = [finding for finding in lint(packages) if finding.severity == "error"]
    assert len(errors) == LINEARS * EACH and {finding.rule for finding in errors} == {"W1"}
    assert "leaves the engine" in errors[0].why


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kv_bits": 8}, "a KV cache of 8 bits cannot be lowered"),
        ({"activation_bits": 8}, "the dynamically scaled input of 'model.layers.0.self_attn.q_proj'"),
        ({"activation_overrides": "down_proj=4"}, "the 4-bit input of 'model.layers.0.mlp.down_proj'"),
        ({"activation_bits": 8, "activation_prefix": 2}, "the packages compute every position alike"),
    ],
)
def test_what_packages_cannot_do_is_refused(
    tiny_qwen2: Path, overrides: dict[str, Any], message: str
) -> None:
    spec = open_checkpoint(tiny_qwen2).spec
    with pytest.raises(UnsupportedError, match=message) as caught:
        check_lowering(spec, SIZES, plan_online(spec, load_recipe("w4-nearest", overrides)))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fold_input_scales": True, "r4": "hadamard"}, "r4 turns what lies between"),
        ({**STATIC, "premultiply_scales": True, "scales": "tensor"}, "premultiply_scales puts a scale"),
        ({**STATIC, "target_bits": 5.0, "mixed_bits": "4,8"}, "a free codebook of 8 bits"),
    ],
)
def test_what_the_integers_do_not_allow_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("w4-nearest", overrides)
