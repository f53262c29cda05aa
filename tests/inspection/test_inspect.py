"""`anequant inspect` against other readings of the same files: safetensors' own, coremltools' own, numpy."""

from __future__ import annotations

import errno
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from running import invoke, succeed
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anequant.checkpoints import reader
from anequant.checkpoints.reader import read_stored
from anequant.checkpoints.source import Source
from anequant.cli.console import Console
from anequant.evaluation import distribution as distribution_module
from anequant.evaluation.distribution import measure_distribution
from anequant.inspection import inspect_checkpoint
from anequant.inspection.inspect import inspect, inspect_tensor
from anequant.inspection.inspect_checkpoint import classify_codebook, classify_scales
from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
from anequant.pipeline.quantize import quantize
from anequant.recipe_files import load_recipe
from anequant.report.terminal.inspect_rows import BAR
from anequant.request import LowerRequest, Request
from anequant.targets.coreml.program.package import MODEL_FILE, WEIGHT_FILE
from anequant.targets.coreml.storage import Weights

LAYERS, VOCAB = 2, 128
LINEARS = LAYERS * 7
DOWN = "model.layers.1.mlp.down_proj"
BYTES = {"F16": 2, "F32": 4, "BF16": 2}
FFN = "llama_FFN_PF_lut4_chunk_01of01.mlpackage"
ONLINE = {"r4": "hadamard", "activation_bits": 8, "kv_bits": 4, "activation_prefix": 2}


@dataclass(frozen=True)
class Made:
    model: Path
    checkpoint: Path
    packages: Path


@pytest.fixture(scope="module")
def made(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random model, what w4-nearest makes of it, and its packages."""
    root = tmp_path_factory.mktemp("inspected")
    sizes = {"num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    model = make_model(root / "model", "llama", False, max_shard_size="300KB", **sizes)
    quantize(Request(Source(model, "model"), load_recipe("w4-nearest")), root / "checkpoint")
    lower(LowerRequest(root / "checkpoint", LowerOptions(context=32, batch=8)), root / "packages")
    return Made(model, root / "checkpoint", root / "packages")


def run(*args: object) -> tuple[int, str, str]:
    ran = invoke("inspect", *args)
    return ran.exit_code, ran.stdout, ran.stderr


def values(*args: object) -> dict[str, Any]:
    """What --json prints, which must be JSON to the letter."""
    ran = succeed("inspect", *args, "--json")
    assert ran.stderr == ""
    return ran.printed


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor, by safetensors' own reader."""
    found = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = part.get_dtype(), part.get_shape()
    return found


# Checkpoints


@pytest.mark.parametrize("which", ["model", "checkpoint"])
def test_tensors_are_those_that_safetensors_reads(made: Made, which: str) -> None:
    folder = getattr(made, which)
    expected, tensors = headers(folder), values(folder)["checkpoint"]["tensors"]
    assert tensors["tensors"] == len(expected)
    sizes = {name: math.prod(shape) for name, (_, shape) in expected.items()}
    assert tensors["values"] == sum(sizes.values())
    dtypes: Counter[str] = Counter()
    for name, (dtype, _) in expected.items():
        dtypes[dtype] += sizes[name] * BYTES[dtype]
    assert tensors["dtypes"] == dtypes
    kinds = Counter(
        (re.sub(r"\.\d+\.", ".*.", name), dtype, tuple(shape)) for name, (dtype, shape) in expected.items()
    )
    assert {(k["name"], k["dtype"], tuple(k["shape"])): k["count"] for k in tensors["kinds"]} == kinds
    assert tensors["files"] == {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def test_widths_scales_and_codebooks_are_those_in_the_file(made: Made) -> None:
    tensors = load_file(made.checkpoint / "model.safetensors")
    facts = values(made.checkpoint)["checkpoint"]
    names = [name.removesuffix(".codebook") for name in tensors if name.endswith(".codebook")]
    assert len(names) == LINEARS
    weights = sum(tensors[f"{name}.weight"].numel() for name in names)
    extra = sum(
        tensors[f"{name}.{part}"].numel()
        for name in names
        for part in ("input_scales", "output_scales", "codebook")
    )
    projections = facts["bits"]["projections"]
    assert (projections["weights"], projections["bits"]) == (weights, 4.0)
    assert projections["stored_bits"] == pytest.approx(4 + 16 * extra / weights)
    table = tensors["lm_head.weight"].numel()
    assert facts["bits"]["head"] == {"weights": table, "bits": 16.0, "stored_bits": 16.0}
    whole = facts["bits"]["whole model"]
    assert whole["bits"] == pytest.approx((4 * weights + 32 * table) / (weights + 2 * table))

    def ends(part: str) -> list[float]:
        every = torch.cat([tensors[f"{name}.{part}"].flatten() for name in names])
        return [float(every.min()), float(every.max())]

    (scales,) = facts["scales"]
    assert (scales["kind"], scales["linears"]) == ("balanced", LINEARS)
    assert (scales["input_range"], scales["output_range"]) == (ends("input_scales"), ends("output_scales"))
    (books,) = facts["codebooks"]
    assert (books["kind"], books["entries"], books["count"]) == ("lut", 16, LINEARS)
    assert books["range"] == ends("codebook")


def test_floats_are_as_wide_as_their_dtype(made: Made) -> None:
    (dtype,) = {dtype for dtype, _ in headers(made.model).values()}
    assert dtype == "F32"
    assert values(made.model)["checkpoint"]["bits"]["whole model"]["bits"] == 32


def test_bits_of_mixed_and_quantized_tables(made: Made, tmp_path: Path) -> None:
    recipe = load_recipe("w4-nearest", {"bits": 8, "codebook": "uniform", "scales": "output", "head_bits": 6})
    quantize(Request(Source(made.model, "model"), recipe), tmp_path / "out")
    facts = inspect(tmp_path / "out").checkpoint
    assert facts is not None
    assert [facts.bits[part].bits for part in ("projections", "head", "embedding")] == [8, 6, 16]
    kinds = {(book.kind, book.entries): book.count for book in facts.codebooks}
    assert kinds == {("uniform", 256): LINEARS, ("uniform", 64): 1}
    assert {kind.kind: kind.linears for kind in facts.scales} == {"output": LINEARS + 1}
    assert facts.recipe is not None and facts.recipe["head_bits"] == 6
    assert facts.made_by is not None and facts.made_by.startswith("anequant ")


def test_what_a_checkpoint_does_at_run_time(made: Made, tmp_path: Path) -> None:
    quantize(Request(Source(made.model, "model"), load_recipe("w4-nearest", ONLINE)), tmp_path / "out")
    online = values(tmp_path / "out")["checkpoint"]["online"]
    assert online["r4"] == {"size": 192, "hadamard_order": 192}
    assert online["activations"]["bits"] == {"4": 0, "8": LINEARS}
    assert online["activations"]["scales"] == "dynamic"
    assert (online["kv_bits"], online["float_prefix"]) == (4, 2)
    text = run(tmp_path / "out")[1]
    for words in ("R4, a Hadamard rotation of 192", "8 bits in 14; dynamic", "KV cache of 4 bits", "first 2"):
        assert words in text
    assert values(made.checkpoint)["checkpoint"]["online"] == {}


def test_no_weight_is_read(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def spy(tensors: Any, names: list[str]) -> Any:
        asked.extend(names)
        return read_stored(tensors, names)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(inspect_checkpoint, "read_stored", spy)
    monkeypatch.setattr(reader.Checkpoint, "read", refuse)
    monkeypatch.setattr(Weights, "read", refuse)
    inspect(made.checkpoint)
    inspect(made.packages)
    assert len(asked) == 3 * LINEARS
    assert not any(name.endswith(".weight") for name in asked)


def test_a_per_tensor_checkpoint_of_another_tool(made: Made, tmp_path: Path) -> None:
    """Without codebooks and without anequant.json, as ANEMLL's own scripts write it."""
    tensors = load_file(made.checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".codebook")}
    shutil.copy(made.checkpoint / "config.json", tmp_path)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    facts = values(tmp_path)["checkpoint"]
    assert (facts["kind"], facts["made_by"], facts["recipe"]) == ("quantized checkpoint", None, None)
    assert facts["codebooks"] == [] and facts["scales"][0]["linears"] == LINEARS
    assert facts["bits"]["projections"]["bits"] is None and facts["bits"]["head"]["bits"] == 16
    text = run(tmp_path)[1]
    assert "width unknown" in text and "not anequant" in text
    entries = [use["entry"] for use in values(tmp_path, "--tensor", DOWN)["codes"]]
    assert entries == pytest.approx(tensors[f"{DOWN}.codebook"].tolist(), rel=2e-3)


@pytest.mark.parametrize(
    ("input_scales", "output_scales", "kind"),
    [
        (torch.rand(1, 8) + 1, torch.rand(4, 1), "balanced"),
        (torch.ones(1, 8), torch.rand(4, 1), "output"),
        (torch.ones(1, 8), torch.full((4, 1), 0.5), "tensor"),
        (torch.ones(1, 8), torch.ones(4, 1), "premultiplied"),
        (torch.ones(1, 8), torch.rand(4, 2), "group"),
    ],
)
def test_kinds_of_scales(input_scales: torch.Tensor, output_scales: torch.Tensor, kind: str) -> None:
    assert classify_scales(input_scales, output_scales) == kind


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kinds_of_codebooks(bits: int) -> None:
    integers = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float()
    assert classify_codebook(integers) == "uniform"
    assert classify_codebook((integers * 0.00317).half().float()) == "uniform"
    moved = integers.clone()
    moved[1] += 0.25
    assert classify_codebook(moved) == "lut"


# What a path is


def test_every_kind_of_path(made: Made, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(made.checkpoint, whole / "checkpoint")
    shutil.copytree(made.packages, whole / "packages")
    for path, kind, packages in (
        (made.model, "float checkpoint", 0),
        (made.checkpoint, "quantized checkpoint", 0),
        (made.packages, "folder of packages", 3),
        (made.packages / FFN, "package", 1),
        (whole, "output of convert", 3),
        (made.checkpoint / "model.safetensors", "safetensors file", 0),
    ):
        found = values(path)
        assert (found["kind"], len(found["packages"])) == (kind, packages)
        assert (found["checkpoint"] is None) == ("checkpoint" not in kind and path != whole)
        assert (found["file"] is None) == (path.suffix != ".safetensors")
        assert kind in run(path)[1]


@pytest.mark.parametrize("name", ["missing", "empty", "words.txt", "broken.mlpackage"])
def test_what_is_nothing_of_the_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("words")
    (tmp_path / "broken.mlpackage").mkdir()
    (tmp_path / "broken.mlpackage" / "Manifest.json").write_text("{}")
    code, out, err = run(tmp_path / name)
    assert (code, out) == (3, "")
    assert err.startswith("error: ")


# Packages


@pytest.mark.parametrize("stem", ["llama_FFN_PF_lut4_chunk_01of01", "llama_embeddings", "llama_lm_head"])
def test_functions_are_those_that_coremltools_reads(made: Made, stem: str) -> None:
    package = made.packages / f"{stem}.mlpackage"
    spec = ct.utils.load_spec(str(package))
    (facts,) = values(package)["packages"]
    assert facts["specification"] == spec.specificationVersion
    assert facts["metadata"] == dict(spec.description.metadata.userDefined)
    assert [function["name"] for function in facts["functions"]] == sorted(spec.mlProgram.functions)
    descriptions = {part.name: part for part in spec.description.functions} or {"main": spec.description}
    for function in facts["functions"]:
        program = spec.mlProgram.functions[function["name"]]
        kinds = Counter(op.type for op in program.block_specializations[program.opset].operations)
        computing = {kind: n for kind, n in kinds.items() if kind != "const" and "constexpr" not in kind}
        assert function["operations"] == computing
        described = descriptions[function["name"]]
        for part, features in (("inputs", described.input), ("outputs", described.output)):
            assert [spec["name"] for spec in function[part]] == [feature.name for feature in features]
        for tensor, feature in zip(function["inputs"], described.input, strict=True):
            sizes = list(feature.type.multiArrayType.shape)
            assert [size or given for size, given in zip(tensor["shape"], sizes, strict=True)] == sizes
        states = {state["name"]: state["shape"] for state in function["states"]}
        assert states == {
            feature.name: list(feature.type.stateType.arrayType.shape) for feature in described.state
        }
    defaults = [function["name"] for function in facts["functions"] if function["default"]]
    assert defaults == [spec.description.defaultFunctionName or "main"]


def test_constants_are_counted_once_and_fill_the_weight_file(made: Made) -> None:
    (facts,) = inspect(made.packages / FFN).packages
    weight_file = next(size for name, size in facts.files.items() if name.endswith("weight.bin"))
    stored = sum(kind.bytes for kind in facts.constants)
    count = sum(kind.count for kind in facts.constants)
    aligned = 2 * 64 * (count + LINEARS) + 64  # a header and its padding, for each blob
    assert stored <= weight_file <= stored + aligned
    tables = next(kind for kind in facts.constants if kind.kind == "lut_to_dense")
    assert (tables.dtype, tables.bits, tables.entries) == ("uint4", 4, 16)
    assert tables.count == tables.tables == LINEARS
    linears = load_file(made.checkpoint / "model.safetensors")
    weights = sum(
        linears[name.replace("codebook", "weight")].numel() for name in linears if name.endswith(".codebook")
    )
    assert (facts.weights, facts.bits) == (tables.values, 4.0) == (weights, 4.0)
    table = inspect(made.packages / "llama_embeddings.mlpackage").packages[0]
    assert (table.weights, table.bits, table.stored_bits) == (VOCAB * 128, 16.0, 16.0)


def test_a_constant_of_a_package_is_what_coremltools_expands(made: Made) -> None:
    package = made.packages / FFN
    model = ct.models.MLModel(str(package), skip_model_load=True)
    program = load_program(model.get_spec(), model.get_spec().specificationVersion, model.weights_dir)
    operation = next(
        op for op in program.functions["infer"].operations if op.op_type == "constexpr_lut_to_dense"
    )
    expanded = operation.materialized_val_inference()
    name = operation.outputs[0].name
    facts = inspect_tensor(package, name)
    assert (facts.shape, facts.tables, facts.place) == (expanded.shape, 1, FFN)
    assert facts.distribution.rms == pytest.approx(float(np.sqrt(np.square(expanded.astype(float)).mean())))
    entries, counts = np.unique(expanded.astype(np.float64), return_counts=True)
    assert facts.codes is not None
    used = [(use.entry, use.count) for use in facts.codes if use.count]
    assert used == list(zip(entries.tolist(), counts.tolist(), strict=True))


def test_a_damaged_program(made: Made, tmp_path: Path) -> None:
    """Codes without an argument, and a weight file that ends early."""
    package = shutil.copytree(made.packages / FFN, tmp_path / FFN)
    file = package / MODEL_FILE
    spec = ct.proto.Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    program = spec.mlProgram.functions["infer"]
    operations = program.block_specializations[program.opset].operations
    table = next(op for op in operations if op.type == "constexpr_lut_to_dense")
    name = table.outputs[0].name
    (package / WEIGHT_FILE).write_bytes((package / WEIGHT_FILE).read_bytes()[:64])
    code, _, err = run(package, "--tensor", name)
    assert code == 3 and "weight.bin" in err
    del table.inputs["lut"].arguments[:]
    file.write_bytes(spec.SerializeToString())
    code, out, err = run(package, "--tensor", name)
    assert (code, out) == (3, "") and FFN in err


def test_names_cannot_steer_a_terminal(made: Made, tmp_path: Path) -> None:
    package = tmp_path / "red\x1b[31m\x07.mlpackage"
    shutil.copytree(made.packages / "llama_embeddings.mlpackage", package)
    code, out, _ = run(package)
    assert code == 0
    assert "red\\x1b[31m\\x07.mlpackage" in out
    assert "\x1b" not in out and "\x07" not in out


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(f"word{number}" for number in range(30))
    rows = [("what", words), ("", "short"), ("files", "x" * 45 + " end")]
    monkeypatch.setenv("COLUMNS", "60")
    Console().result({}, rows)
    plain = capsys.readouterr().out.splitlines()
    assert plain == [f"what   {words}", "       short", f"files  {'x' * 45} end"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Console().result({}, rows)
    wrapped = capsys.readouterr().out.splitlines()
    assert len(wrapped) > len(plain) and max(map(len, wrapped)) <= 60
    assert " ".join(" ".join(wrapped).split()) == " ".join(" ".join(plain).split())
    assert wrapped[1].startswith(" " * 11 + "word")


def test_a_pipe_that_is_closed_is_no_error(monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    def closed(*args: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(Console, "result", closed)
    code, out, err = run(made.checkpoint)
    assert (code, out, err) == (1, "", "")


# One tensor


def kurtosis(x: np.ndarray[Any, Any]) -> float:
    off = x - x.mean()
    return float((off**4).mean() / (off**2).mean() ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_statistics_are_numpys(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution_module, "CHUNK", 100)
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(37, 41, generator=generator) ** 3 - 2).clamp(-50, 20).to(dtype)
    tensor[3, :7] = 0
    x, own = tensor.double().numpy(), measure_distribution(tensor)
    assert (own.values, own.not_finite) == (x.size, 0)
    assert (own.low, own.high) == (x.min(), x.max())
    rms = math.sqrt((x**2).mean())
    expected = (x.mean(), x.std(), rms, kurtosis(x), abs(x).max() / rms, (x == 0).mean())
    assert (own.mean, own.std, own.rms, own.kurtosis, own.peak, own.zeros) == pytest.approx(expected)
    counts, _ = np.histogram(x, len(own.counts))
    assert sum(own.counts) == x.size
    assert abs(np.array(own.counts) - counts).sum() <= 2  # a value on the edge of two bins


def test_statistics_of_odd_tensors() -> None:
    odd = measure_distribution(torch.tensor([1.0, math.nan, math.inf, -3.0]))
    assert (odd.values, odd.not_finite, odd.low, odd.high, odd.mean) == (2, 2, -3, 1, -1)
    constant = measure_distribution(torch.full((5,), 2.0))
    assert (constant.std, constant.kurtosis, constant.peak, sum(constant.counts)) == (0, None, 1, 5)
    zeros = measure_distribution(torch.zeros(4))
    assert (zeros.peak, zeros.zeros) == (None, 1)
    for nothing in (torch.empty(0, 3), torch.tensor([math.nan])):
        empty = measure_distribution(nothing)
        assert (empty.values, empty.low, empty.rms, empty.counts) == (0, None, None, ())


def test_codes_are_those_that_a_reader_finds(made: Made) -> None:
    tensors = load_file(made.checkpoint / "model.safetensors")
    parts = ("weight", "input_scales", "output_scales", "codebook")
    weight, given, out, book = (tensors[f"{DOWN}.{part}"].numpy().astype(np.float64) for part in parts)
    codes = abs((weight / given / out)[..., None] - book).argmin(-1)
    for name in (DOWN, f"{DOWN}.weight"):
        facts = values(made.checkpoint, "--tensor", name)
        assert [use["count"] for use in facts["codes"]] == np.bincount(codes.ravel(), minlength=16).tolist()
        assert [use["entry"] for use in facts["codes"]] == book.tolist()
        assert (facts["dtype"], facts["shape"]) == ("F16", list(weight.shape))
        assert facts["distribution"]["kurtosis"] == pytest.approx(kurtosis(weight))
    assert values(made.checkpoint, "--tensor", f"{DOWN}.input_scales")["codes"] is None
    assert values(made.model, "--tensor", DOWN)["codes"] is None


def test_the_histogram_of_a_tensor(made: Made, tmp_path: Path) -> None:
    tensor = torch.cat([torch.zeros(1000), torch.tensor([1.0]), torch.tensor([-1.0, math.nan])])
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    code, out, _ = run(tmp_path / "x.safetensors", "--tensor", "x")
    assert code == 0
    bars = [len(match[1]) for match in re.finditer(r"\d  (#+)$", out, re.MULTILINE)]
    assert bars == [1, BAR, 1]
    assert re.search(r"^not finite +1 values", out, re.MULTILINE)
    assert re.search(r"^zeros +99.80%", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 60


def test_the_histogram_of_a_constant(made: Made) -> None:
    out = run(made.checkpoint, "--tensor", "model.norm.weight")[1]
    assert re.search("^histogram +all values are 1$", out, re.MULTILINE)


def test_a_name_that_is_not_there(made: Made) -> None:
    code, out, err = run(made.checkpoint, "--tensor", "model.layers.1.mlp.down_prj")
    assert (code, out) == (2, "")
    assert f"did you mean '{DOWN}." in err
    for path in (made.packages, made.packages / FFN, made.checkpoint / "model.safetensors"):
        code, _, err = run(path, "--tensor", "x\x1b[2J")
        assert code == 2 and "for example" in err and "\x1b" not in err
