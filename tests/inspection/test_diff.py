"""`anequant diff`: copies that were changed in a known way, and logits against transformers' own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from files import edit_json, edit_tensors
from google.protobuf.message import Message
from running import invoke
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import Source
from anequant.inspection.diff_checkpoints import diff_values
from anequant.inspection.diff_packages import diff_functions, pair_packages
from anequant.inspection.diff_paths import LENGTH, diff, diff_logits
from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
from anequant.pipeline.quantize import quantize
from anequant.recipe_files import load_recipe
from anequant.reference.windows import choose_probe_tokens
from anequant.request import LowerRequest, Request
from anequant.targets.coreml import graph as graph_module
from anequant.targets.coreml.graph import read_graphs
from anequant.targets.coreml.interpreter import interpreter
from anequant.targets.coreml.program.package import MODEL_FILE, WEIGHT_FILE
from anequant.targets.coreml.storage import read_model

SAME, DIFFERENT, USAGE, INPUT = 0, 1, 2, 3
VOCAB = 8192
DOWN = "model.layers.1.mlp.down_proj"
FFN = "llama_FFN_PF_lut4_chunk_01of01.mlpackage"
NOTHING: dict[str, list[str]] = {"only_a": [], "only_b": [], "forms": [], "values": []}


@dataclass(frozen=True)
class Made:
    model: Path
    checkpoint: Path
    packages: Path


@pytest.fixture(scope="module")
def made(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Made:
    """A random model with the bundled model's tokenizer, its w4-nearest checkpoint, and its packages."""
    root = tmp_path_factory.mktemp("compared")
    model = make_model(root / "model", "llama", False, num_hidden_layers=2, vocab_size=VOCAB)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_qwen2 / name, model)
    quantize(Request(Source(model, "model"), load_recipe("w4-nearest")), root / "checkpoint")
    lower(LowerRequest(root / "checkpoint", LowerOptions(context=32, batch=8)), root / "packages")
    return Made(model, root / "checkpoint", root / "packages")


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return shutil.copytree(made.checkpoint, tmp_path / "copy")


@pytest.fixture
def package(made: Made, tmp_path: Path) -> Path:
    """A decoder package to change."""
    return shutil.copytree(made.packages / FFN, tmp_path / FFN)


def run(*args: object) -> tuple[int, str, str]:
    ran = invoke("diff", *args)
    return ran.exit_code, ran.stdout, ran.stderr


def found(a: Path, b: Path, code: int, *more: object) -> dict[str, Any]:
    """What --json prints, which must be JSON to the letter, after the exit code and the text agree."""
    ran = invoke("diff", a, b, "--json", *more)
    assert (ran.exit_code, ran.stderr) == (code, "")
    values = ran.printed
    assert values["same"] == (code == SAME)
    text = invoke("diff", a, b).stdout
    assert text.rstrip().endswith("nothing differs" if code == SAME else "they differ")
    return values


# Checkpoints


def test_a_copy_is_the_same(made: Made, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    checkpoint = found(made.checkpoint, copy, SAME)["checkpoint"]
    assert checkpoint["tensors"] == {**NOTHING, "equal": len(tensors)}
    assert (checkpoint["config"], checkpoint["recipe"], checkpoint["files"]) == ({}, {}, [])


def test_shards_do_not_matter(make_model: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1}
    whole = make_model(tmp_path / "whole", "llama", False, **sizes)
    parts = make_model(tmp_path / "parts", "llama", False, max_shard_size="200KB", **sizes)
    assert len(list(parts.glob("*.safetensors"))) > 1
    assert diff(whole, parts).same


def test_a_changed_weight_by_how_much(made: Made, copy: Path) -> None:
    before: list[Tensor] = []

    def edit(tensors: dict[str, Tensor]) -> None:
        weight = tensors["lm_head.weight"]
        before.append(weight.clone())
        weight[5] *= 1.5
        tensors["model.norm.weight"][3] += 0.25

    edit_tensors(copy, edit)
    tensors = found(made.checkpoint, copy, DIFFERENT)["checkpoint"]["tensors"]
    head, norm = sorted(tensors["values"], key=lambda value: value["name"])
    after = load_file(copy / "model.safetensors")["lm_head.weight"].double().numpy()
    a = before[0].double().numpy()
    assert head["relative_error"] == pytest.approx(np.linalg.norm(a - after) / np.linalg.norm(a))
    assert head["max_abs"] == abs(a - after).max()
    assert (head["codes"], norm["codes"]) == (None, None)
    assert norm["max_abs"] == pytest.approx(0.25, abs=1e-3)
    assert [value["relative_error"] for value in tensors["values"]] == sorted(
        (value["relative_error"] for value in tensors["values"]), reverse=True
    )
    text = run(made.checkpoint, copy)[1]
    assert f"lm_head.weight     off by {head['relative_error']:.2%}, at most" in text


def test_codes_that_differ_are_counted(made: Made, copy: Path) -> None:
    """Ten weights of one row get the entry next to theirs, as another rounding would give."""
    parts = ("weight", "input_scales", "output_scales", "codebook")

    def edit(tensors: dict[str, Tensor]) -> None:
        weight, given, out, book = (tensors[f"{DOWN}.{part}"] for part in parts)
        core = (weight.double() / given.double() / out.double())[7, :10]
        codes = (core[:, None] - book.double()).abs().argmin(-1)
        moved = torch.where(codes < 8, codes + 1, codes - 1)
        weight[7, :10] = (out[7] * book[moved] * given[0, :10]).half()

    edit_tensors(copy, edit)
    (value,) = found(made.checkpoint, copy, DIFFERENT)["checkpoint"]["tensors"]["values"]
    assert (value["name"], value["codes"]) == (f"{DOWN}.weight", 10)
    assert f"10 of {value['values']} codes" in run(made.checkpoint, copy)[1]


def test_missing_tensors_and_other_dtypes_and_shapes(made: Made, copy: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{DOWN}.input_scales"]
        tensors["extra.weight"] = torch.ones(2)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        tensors[f"{DOWN}.codebook"] = torch.cat([tensors[f"{DOWN}.codebook"], torch.tensor([9.0])])

    edit_tensors(copy, edit)
    tensors = found(made.checkpoint, copy, DIFFERENT)["checkpoint"]["tensors"]
    assert (tensors["only_a"], tensors["only_b"]) == ([f"{DOWN}.input_scales"], ["extra.weight"])
    assert {form["name"]: (form["dtypes"], form["shapes"]) for form in tensors["forms"]} == {
        "model.norm.weight": (["F16", "F32"], [[128], [128]]),
        f"{DOWN}.codebook": (["F32", "F32"], [[16], [17]]),
    }
    assert tensors["values"] == []
    assert tensors["equal"] == len(load_file(made.checkpoint / "model.safetensors")) - 3


def test_config_recipe_and_tokenizer(made: Made, copy: Path) -> None:
    edit_json(copy / "config.json", max_position_embeddings=512, note="x")
    recipe = json.loads((copy / "anequant.json").read_text())["recipe"]
    edit_json(copy / "anequant.json", recipe={**recipe, "bits": 8})
    (copy / "tokenizer.json").write_text("{}")
    checkpoint = found(made.checkpoint, copy, DIFFERENT)["checkpoint"]
    assert checkpoint["config"] == {"max_position_embeddings": [256, 512], "note": [None, "x"]}
    assert checkpoint["recipe"] == {"bits": [4, 8]}
    assert checkpoint["files"] == ["tokenizer.json"]
    assert checkpoint["tensors"]["values"] == []


def test_a_float_model_and_its_checkpoint(made: Made) -> None:
    values = found(made.model, made.checkpoint, DIFFERENT)["checkpoint"]
    names = load_file(made.checkpoint / "model.safetensors").keys()
    floats = load_file(made.model / "model.safetensors").keys()
    assert set(values["tensors"]["only_b"]) == names - floats
    assert values["recipe"]["bits"] == [None, 4]
    text = run(made.model, made.checkpoint)[1]
    assert "only B tells one: r1 block-hadamard" in text and "rotated differently" in text


def test_a_value_that_is_not_finite_is_refused(made: Made, copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors["model.norm.weight"].__setitem__(0, math.nan))
    code, out, err = run(made.checkpoint, copy)
    assert (code, out) == (INPUT, "")
    assert "'model.norm.weight' holds 1 values that are not finite" in err


@pytest.mark.parametrize(
    ("a", "b", "relative", "largest"),
    [
        ([0.0, 0.0], [0.0, 0.5], None, 0.5),
        ([3.0, 4.0], [3.0, 4.0 + 5.0], 1.0, 5.0),
        ([1.0, math.inf], [1.0, 2.0], None, None),
        ([1.0, 2.0], [math.nan, 2.0], None, None),
    ],
)
def test_errors(a: list[float], b: list[float], relative: float | None, largest: float | None) -> None:
    value = diff_values("x", torch.tensor(a), torch.tensor(b))
    assert value is not None
    assert (value.relative_error, value.max_abs) == (relative, largest)


@pytest.mark.parametrize("values", [[1.0, -2.0], [math.inf, math.nan], []])
def test_equal_values_of_any_kind(values: list[float]) -> None:
    assert diff_values("x", torch.tensor(values), torch.tensor(values, dtype=torch.float64)) is None


# Packages


def rewrite(package: Path, edit: Callable[[Any], None]) -> None:
    file = package / MODEL_FILE
    spec = ct.proto.Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    edit(spec)
    file.write_bytes(spec.SerializeToString())


def block(spec: Any, function: str) -> Any:
    program = spec.mlProgram.functions[function]
    return program.block_specializations[program.opset]


def the_package(values: dict[str, Any]) -> dict[str, Any]:
    (package,) = values["packages"]
    assert isinstance(package, dict)
    return package


def test_copies_of_packages_are_the_same(made: Made, package: Path, tmp_path: Path) -> None:
    assert the_package(found(made.packages / FFN, package, SAME))["constants"]["values"] == []
    folder = shutil.copytree(made.packages, tmp_path / "folder")
    values = found(made.packages, folder, SAME)
    assert [package["a"] for package in values["packages"]] == sorted(
        path.name for path in made.packages.glob("*.mlpackage")
    )
    whole = tmp_path / "whole"
    shutil.copytree(made.checkpoint, whole / "checkpoint")
    shutil.copytree(made.packages, whole / "packages")
    values = found(whole, made.packages, SAME)
    assert values["checkpoint"] is None and len(values["packages"]) == 3
    assert found(made.checkpoint, whole, SAME)["packages"] == []


def test_a_changed_codebook_in_the_weight_file(made: Made, package: Path) -> None:
    book = load_file(made.checkpoint / "model.safetensors")[f"{DOWN}.codebook"].half().numpy()
    changed = book.copy()
    changed[15] += 0.125
    data = (package / WEIGHT_FILE).read_bytes()
    assert data.count(book.tobytes()) == 1
    (package / WEIGHT_FILE).write_bytes(data.replace(book.tobytes(), changed.tobytes()))
    difference = the_package(found(made.packages / FFN, package, DIFFERENT))
    (value,) = difference["constants"]["values"]
    assert value["name"].endswith("layers_1_mlp_down_proj_weight")
    assert (value["codes"], value["max_abs"]) == (0, pytest.approx(0.125, abs=2e-3))
    assert difference["functions"] == []


def test_changed_graphs(made: Made, package: Path) -> None:
    def edit(spec: Any) -> None:
        infer = block(spec, "infer")
        conv = next(op for op in infer.operations if op.type == "conv")
        changed.append(conv.outputs[0].name)
        conv.inputs["x"].arguments[0].name = "hidden_states"
        silu = next(op for op in infer.operations if op.type == "silu")
        silu.type = "gelu"
        changed.append(silu.outputs[0].name)
        given = spec.mlProgram.functions["infer"].inputs[0]
        given.type.tensorType.dimensions[2].constant.size = 64
        spec.description.metadata.userDefined["note"] = "x"

    changed: list[str] = []
    rewrite(package, edit)
    difference = the_package(found(made.packages / FFN, package, DIFFERENT))
    (function,) = difference["functions"]
    assert function["name"] == "infer"
    assert set(function["changed"]) == set(changed)
    assert function["operations"] == {"gelu": [0, 1], "silu": [2, 1]}
    assert list(function["tensors"].values()) == [["fp16 [1, 1, 128]", "fp16 [1, 1, 64]"]]
    assert difference["metadata"] == {"note": [None, "x"]}
    assert difference["constants"]["values"] == []


def test_where_constants_lie_does_not_matter(made: Made, package: Path) -> None:
    def edit(spec: Any) -> None:
        for operation in block(spec, "infer").operations:
            given = [binding.value for part in operation.inputs.values() for binding in part.arguments]
            for value in (*given, *operation.attributes.values()):
                if value.WhichOneof("value") == "blobFileValue":
                    value.blobFileValue.offset += 64
                    moved.append(value)

    moved: list[Any] = []
    rewrite(package, edit)
    assert len(moved) > 7
    one, other = read_graphs(made.packages / FFN), read_graphs(package)
    assert [diff_functions(a, b).same for a, b in zip(one, other, strict=True)] == [True, True]


class Reordered:
    """A protobuf message whose maps have an order of their own, as they have in every process."""

    def __init__(self, message: Any, descending: bool) -> None:
        self._message, self._descending = message, descending

    def __getattr__(self, name: str) -> Any:
        return reordered(getattr(self._message, name), self._descending)


def reordered(value: Any, descending: bool) -> Any:
    if isinstance(value, Message):
        return Reordered(value, descending)
    if isinstance(value, Mapping):
        return {key: reordered(value[key], descending) for key in sorted(value, reverse=descending)}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [reordered(item, descending) for item in value]
    return value


@pytest.fixture
def other_order_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that is read has its maps the other way around than the one before."""
    turns = cycle((False, True))
    for module in (graph_module, interpreter):
        monkeypatch.setattr(module, "read_model", lambda file: reordered(read_model(file), next(turns)))


@pytest.mark.usefixtures("other_order_each_time")
def test_the_order_of_maps_does_not_matter(made: Made, package: Path) -> None:
    """Nor does it to what is said of one package: every command reads it in both orders."""
    orders = [
        [list(node.proto.inputs) for graph in read_graphs(package) for node in graph.nodes] for _ in range(2)
    ]
    assert orders[0] != orders[1]
    assert the_package(found(made.packages / FFN, package, SAME))["functions"] == []
    for command in (["lint"], ["inspect", "--json"]):
        said = [invoke(*command, package).stdout for _ in range(2)]
        assert said[0] == said[1] != ""
    opened = [interpreter.Package.open(package) for _ in range(2)]
    named = [[(function, value) for function, value, _ in one.read_compressed_weights()] for one in opened]
    assert named[0] == named[1] != []
    assert [list(one.functions) for one in opened] == [["infer", "prefill"]] * 2


def test_an_order_that_differs(made: Made, package: Path) -> None:
    def edit(spec: Any) -> None:
        operations = block(spec, "infer").operations
        first, last = (operations[i].SerializeToString() for i in (0, 1))
        operations[0].ParseFromString(last)
        operations[1].ParseFromString(first)

    rewrite(package, edit)
    (function,) = the_package(found(made.packages / FFN, package, DIFFERENT))["functions"]
    assert (function["operations"], len(function["changed"])) == ({}, 2)


def test_a_function_that_is_missing(made: Made, package: Path) -> None:
    rewrite(package, lambda spec: spec.mlProgram.functions.pop("prefill"))
    difference = the_package(found(made.packages / FFN, package, DIFFERENT))
    assert (difference["only_a"], difference["only_b"]) == (["prefill"], [])
    assert "prefill is in A only" in run(made.packages / FFN, package)[1]


def test_packages_are_matched_by_name_without_the_width(made: Made, tmp_path: Path) -> None:
    ours = tuple(Path(name) for name in ("a_head_lut6.mlpackage", "a_FFN_PF_lut4_chunk_01of02.mlpackage"))
    theirs = tuple(Path(name) for name in ("a_head.mlpackage", "a_FFN_PF_lut8_chunk_02of02.mlpackage"))
    assert list(pair_packages(ours, theirs)) == [(ours[1], None), (None, theirs[1]), (ours[0], theirs[0])]
    assert list(pair_packages(ours[:1], theirs[1:])) == [(ours[0], theirs[1])]
    folder = shutil.copytree(made.packages, tmp_path / "folder")
    (folder / FFN).rename(folder / FFN.replace("lut4", "lut6"))
    shutil.rmtree(folder / "llama_lm_head.mlpackage")
    values = found(made.packages, folder, DIFFERENT)
    assert (values["only_a"], values["only_b"]) == (["llama_lm_head.mlpackage"], [])
    assert len(values["packages"]) == 2


# Logits


def test_divergences_are_those_of_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    base, ours = (3 * torch.randn(3, 5, 11, generator=generator) for _ in range(2))
    tokens = torch.randint(11, (3, 5), generator=generator)
    result = diff_logits(tokens, iter(base), iter(ours))
    a, b = (part.double().numpy()[:, :-1] for part in (base, ours))
    p, q = (np.exp(part) / np.exp(part).sum(-1, keepdims=True) for part in (a, b))
    assert result.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-5)
    assert result.top1 == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean())
    assert result.max_abs == float((base - ours).abs().max())
    assert result.tokens == 12


def test_logits_are_those_of_transformers(made: Made, tmp_path: Path) -> None:
    """Without a tokenizer, on tokens that anyone can draw again."""
    a, b = shutil.copytree(made.model, tmp_path / "a"), shutil.copytree(made.checkpoint, tmp_path / "b")
    for folder in (a, b):
        for file in folder.glob("tokenizer*"):
            file.unlink()
    result = diff(a, b, compare_logits=True).logits
    assert result is not None
    tokens = choose_probe_tokens(open_checkpoint(a), LENGTH)
    with torch.no_grad():
        base, ours = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens[None]).logits[0].double()
            for folder in (a, b)
        )
    p, q = base[:-1].log_softmax(-1), ours[:-1].log_softmax(-1)
    assert result.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert result.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert result.max_abs == pytest.approx(float((base - ours).abs().max()), rel=1e-3)
    assert result.tokens == LENGTH - 1


def test_logits_on_a_text(made: Made, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a text. " * 60)
    code, out, err = run(made.checkpoint, made.checkpoint, "--logits", "--text", text, "--json")
    assert (code, err) == (SAME, "")
    logits = json.loads(out)["logits"]
    assert (logits["kl"], logits["top1"], logits["max_abs"]) == (0, 1, 0)
    assert logits["tokens"] % (LENGTH - 1) == 0
    assert "same top token" in run(made.checkpoint, made.model, "--logits", "--text", text)[1]


def test_logits_of_packages(made: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(made.packages, tmp_path / "folder")
    book = load_file(made.checkpoint / "model.safetensors")[f"{DOWN}.codebook"].half().numpy()
    file = folder / FFN / WEIGHT_FILE
    file.write_bytes(file.read_bytes().replace(book.tobytes(), (book / 2).tobytes()))
    result = diff(made.packages, folder, compare_logits=True).logits
    assert result is not None
    assert result.tokens == 31 and result.kl > 0 and result.max_abs > 0
    code, _, err = run(made.packages / FFN, folder, "--logits")
    assert code == USAGE and "meta.yaml" in err


# What cannot be compared


def test_refusals(made: Made, make_model: Callable[..., Path], tmp_path: Path) -> None:
    for args, code, words in (
        ((made.checkpoint, made.packages), USAGE, "compare two checkpoints, two packages or two bundles"),
        ((made.checkpoint, tmp_path / "nothing"), INPUT, "does not exist"),
        ((made.checkpoint, made.checkpoint, "--text", "x"), USAGE, "add --logits"),
        ((made.checkpoint, made.checkpoint, "--logits", "--text", tmp_path / "no"), USAGE, "cannot be read"),
    ):
        got, out, err = run(*args)
        assert (got, out) == (code, "")
        assert words in err
    small = make_model(tmp_path / "small", "llama", False, num_hidden_layers=2)
    values = found(made.model, small, DIFFERENT)["checkpoint"]
    assert {form["name"] for form in values["tensors"]["forms"]} == {
        *("model.embed_tokens.weight", "lm_head.weight")
    }
    code, _, err = run(made.model, small, "--logits")
    assert code == INPUT and "vocabularies of 8192 and 97" in err
