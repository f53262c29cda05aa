"""Every rule about assets with functions or files that break it, and close ones that do not.

Functions are listings made by hand; our own assets, and one that Apple's package writes in a test, go through
its parser.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Quantized
from listings import Program, contract, functional, listing, transformer
from running import invoke

from anequant.errors import InputError, UnsupportedError
from anequant.lower_options import AssetOptions
from anequant.pipeline.lower import lower
from anequant.request import LowerRequest
from anequant.targets.coreai import listing as listings_module
from anequant.targets.coreai import worker_process
from anequant.targets.coreai.assemble import HASH, PROGRAM
from anequant.targets.coreai.bundle import METADATA, find_asset
from anequant.targets.coreai.installed import find_problem
from anequant.targets.coreai.lint.bundle_rules import BLOB_RULES, FILE_RULES
from anequant.targets.coreai.lint.contract_rules import CONTRACT_RULES
from anequant.targets.coreai.lint.lint_bundle import FUNCTION_RULES, lint_asset, lint_bundle
from anequant.targets.coreai.lint.linted import Linted
from anequant.targets.coreai.listing import Form, read_form, read_listing
from anequant.targets.coreai.stored import StoredAsset
from anequant.targets.shared.finding import Finding

problem = find_problem()
needs_coreai = pytest.mark.skipif(problem is not None, reason=problem.what if problem else "")

X = "tensor<1x128x1x64xf16>"
WEIGHT = "tensor<128x128x1x1xf16>"
CODES = "tensor<128x128x1x1xui4>"
ONE_TABLE = "tensor<1x1x1x1x16x1xf16>"

Broken = set[tuple[str, str]]
Body = Callable[[Program], Any]


def look_up(program: Program, table: str = ONE_TABLE) -> int:
    codes, entries = program.constant(CODES, name="w.codes"), program.constant(table, name="w.codebook")
    return program.op("lut_to_dense", codes, entries, type=WEIGHT)


def conv(program: Program, weight: int, type: str = X) -> int:
    return program.op("conv2d", 0, weight, type=type)


def scaled(program: Program, weight: str, scale: str) -> int:
    data = program.constant(weight, name="w.data")
    zero, scales = program.constant(scale, name="w.zero"), program.constant(scale, name="w.scale")
    return conv(program, program.op("blockwise_shift_scale", data, scales, zero, zero, type=WEIGHT))


def scaled_table(program: Program, kind: str, scale: str) -> int:
    operands = (look_up(program), program.constant(scale, name="w.scale"))
    return conv(program, program.op(kind, *operands, type=WEIGHT))


BREACHES: dict[str, tuple[str, Body]] = {
    "CS1": ("error", lambda p: p.op("reshape", 0, type="tensor<1x2x64x1x8x8xf16>")),
    "CS2": ("error", lambda p: p.op("slice", 0, type="tensor<1x?x1x64xf16>")),
    "CS4": ("warning", lambda p: conv(p, p.constant(WEIGHT, name="w"), "tensor<1x32000x1x64xf16>")),
    "CS5": ("error", lambda p: p.op("slice", 0, type="tensor<1x0x1x64xf16>")),
    "CD1": ("error", lambda p: p.op("cast", 0, type="tensor<1x128x1x64xf32>")),
    "CD1, a constant": ("error", lambda p: p.constant("tensor<f32>", numbers=[1.0], range=[1.0, 1.0])),
    "CD1, integers": ("warning", lambda p: p.op("reduce_sum", 0, type="tensor<1x128x1x1xsi32>")),
    "CD2": ("error", lambda p: p.constant(X, range=[-np.inf, 0.0])),
    "CD2, nan": ("error", lambda p: p.constant(X, range=[np.nan, np.nan])),
    "CD2, the end": ("warning", lambda p: p.constant(X, range=[-65504.0, 0.0])),
    "CO1": ("error", lambda p: p.op("argmax", 0, type="tensor<1x1x1x64xui16>")),
    "CO1, its parts": ("error", lambda p: p.op("reduce_index", 0, type="tensor<1x1x1x64xui16>")),
    "CO2": ("warning", lambda p: p.op("sort", 0, type=X)),
    "CO3": ("warning", lambda p: p.op("batch_matmul", 0, 0, type="tensor<1x4x64x64xf16>")),
    "CO4": (
        "warning",
        lambda p: p.op(
            "decomposable.broadcasting_batch_matmul",
            0,
            p.op("transpose", p.constant(WEIGHT, name="w"), type=WEIGHT),
            type="tensor<1x1x64x64xf16>",
        ),
    ),
    "CO5": ("warning", lambda p: p.op("metal4_kernel", 0, type=X)),
    "CW1": ("warning", lambda p: conv(p, look_up(p, "tensor<4x1x1x1x16x1xf16>"))),
    "CW2": ("error", lambda p: scaled(p, "tensor<128x128x1x1xsi8>", "tensor<128x4x1x1xf16>")),
    "CW2, one block a row": ("error", lambda p: scaled(p, CODES, "tensor<32x1x1x1xf16>")),
    "CW3": ("error", lambda p: scaled_table(p, "blockwise_shift_scale", "tensor<128x2x1x1xf16>")),
    "CW3, a product": (
        "error",
        lambda p: scaled_table(p, "decomposable.broadcasting_mul", "tensor<128x128x1x1xf16>"),
    ),
    "CW3, rows": ("warning", lambda p: scaled_table(p, "blockwise_shift_scale", "tensor<128x1x1x1xf16>")),
    "CW4": ("note", lambda p: conv(p, look_up(p, "tensor<1x1x1x1x16x2xf16>"))),
}
PORTS: dict[str, tuple[str, dict[str, str]]] = {
    "CS2, an input": ("error", {"x": "tensor<1x?xf16>"}),
    "CS3": ("warning", {"x": "tensor<1x128x64x1xf16>"}),
    "CD1, an input": ("error", {"x": "tensor<1x128xf32>"}),
}
SOUND: dict[str, Body] = {
    "one table": lambda p: conv(p, look_up(p)),
    "a scale after the convolution": lambda p: p.op(
        "decomposable.broadcasting_mul",
        conv(p, look_up(p)),
        p.constant("tensor<1x128x1x1xf16>", name="s"),
        type=X,
    ),
    "a table of embeddings that is scaled": lambda p: p.op(
        "decomposable.broadcasting_mul",
        look_up(p),
        p.constant("tensor<128x1x1x1xf16>", name="s"),
        type=WEIGHT,
    ),
    "integers with scales of rows": lambda p: scaled(p, "tensor<128x128x1x1xsi8>", "tensor<128x1x1x1xf16>"),
    "a mask of -40000": lambda p: p.constant(X, range=[-40000.0, 0.0]),
    "one head": lambda p: p.op("batch_matmul", 0, 0, type="tensor<1x1x64x64xf16>"),
    "positions": lambda p: p.op("cast", 0, type="tensor<1x8xsi32>"),
    "a shape of no axes": lambda p: p.constant("tensor<0xui32>", numbers=[]),
    "an axis of 16384": lambda p: conv(p, p.constant(WEIGHT, name="w"), "tensor<1x16384x1x64xf16>"),
    "rank five": lambda p: p.op("expand_dims", 0, type="tensor<1x1x128x1x64xf16>"),
}


def broken(rules: Any, *arguments: Any) -> Broken:
    return {(rule.id, hit.severity or rule.severity) for rule in rules for hit in rule.check(*arguments)}


def broken_by(body: Body) -> Broken:
    program = Program(x=X)
    body(program)
    (function,) = listing(program)
    return broken(FUNCTION_RULES, function)


@pytest.mark.parametrize("case", BREACHES)
def test_what_breaks_a_rule_is_found(case: str) -> None:
    severity, body = BREACHES[case]
    assert broken_by(body) == {(case.partition(",")[0], severity)}


@pytest.mark.parametrize("case", PORTS)
def test_ports_that_break_a_rule_are_found(case: str) -> None:
    severity, inputs = PORTS[case]
    (function,) = listing(Program(**inputs))
    assert broken(FUNCTION_RULES, function) == {(case.partition(",")[0], severity)}


def test_a_helper_may_have_open_axes() -> None:
    """Apple's exporter leaves the forms in an asset of which it makes a static copy for each size."""
    (function,) = listing(Program(x="tensor<1x?xf16>"))
    assert broken(FUNCTION_RULES, replace(function, public=False)) == set()


PRIVATE = """
import os, sys
from pathlib import Path
from anequant.targets.coreai.coreai_toolkit import AIProgram, GraphOp, Module
from anequant.targets.coreai.program.builder import make_type
module = Module.create()
with module._block_context():
    for name, private in (("helper", True), ("main", False)):
        graph = GraphOp(name, [make_type("float16", (1, 8192))], [], input_names=["x"], private=private)
        with graph.block:
            graph.set_outputs_spec_from_dict({"y": graph.arguments[0]})
AIProgram(module).save_asset(Path(sys.argv[1]))
os._exit(0)
"""


@pytest.mark.skipif(find_problem() is not None, reason="needs coreai-core")
def test_who_may_call_a_function_is_read(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PRIVATE, str(tmp_path / "m.aimodel")], check=True)
    functions = read_listing(tmp_path / "m.aimodel")
    assert {function.name: function.public for function in functions} == {"helper": False, "main": True}


@pytest.mark.parametrize("case", SOUND)
def test_what_is_sound_is_not_found(case: str) -> None:
    assert broken_by(SOUND[case]) == set()


def test_operations_are_called_after_the_nearest_constant() -> None:
    program = Program(x=X)
    conv(program, look_up(program))
    (function,) = listing(program)
    assert [function.call(operation) for operation in function.operations] == [
        "w.codes",
        "w.codebook",
        "lut_to_dense of w.codebook",
        "conv2d of w.codebook",
    ]


# The contract of Apple's runner.


def replaced(**own: Program | None) -> dict[str, Program]:
    programs = contract()
    for name, program in own.items():
        if program is None:
            del programs[name]
        else:
            programs[name] = program
    return programs


def renamed(program: Program, old: str, new: str) -> Program:
    for ports in (program.inputs, program.outputs):
        if old in ports:
            ports[new] = ports.pop(old)
    return program


def retyped(program: Program, name: str, type: str) -> Program:
    for ports in (program.inputs, program.outputs):
        if name in ports:
            ports[name] = type
    return program


def each_transformer(make: Callable[[str, int, int], Program]) -> dict[str, Program]:
    """The contract with other functions of the transformer."""
    programs = contract()
    for name in programs:
        if name.startswith(("extend", "prompt")):
            kind, context, length = name.rsplit("_", 2)
            programs[name] = make(kind, int(context), int(length))
    return programs


def linted(programs: dict[str, Program]) -> Linted:
    return Linted(Path("a.aimodel"), None, listing(*programs.values()))


def mistakes() -> dict[str, tuple[Broken, dict[str, Program]]]:
    extend, load = contract()["extend_512_8"], contract()["load_embeddings"]
    error = "error"
    return {
        "CC1": ({("CC1", "warning")}, {"main": Program("main", x=X)}),
        "CC2, an input's name": (
            {("CC2", error)},
            replaced(extend_512_8=renamed(transformer("extend", 512, 8), "causal_mask", "mask")),
        ),
        "CC2, a type": (
            {("CC2", error)},
            replaced(extend_512_8=retyped(transformer("extend", 512, 8), "position_ids", "tensor<1x8xsi32>")),
        ),
        "CC2, a shape": (
            {("CC2", error)},
            replaced(
                extend_512_8=retyped(transformer("extend", 512, 8), "causal_mask", "tensor<1x1x8x512xf16>")
            ),
        ),
        "CC2, an output": (
            {("CC2", error)},
            replaced(extend_512_8=renamed(transformer("extend", 512, 8), "out_logits", "logits")),
        ),
        "CC2, a state": (
            {("CC2", error)},
            replaced(extend_512_8=renamed(transformer("extend", 512, 8), "value_cache", "v_cache")),
        ),
        "CC2, a table": (
            {("CC2", error)},
            replaced(load_embeddings=retyped(load, "embedding_table", "tensor<512x128xf16>")),
        ),
        "CC2, a function's name": (
            {("CC2", error)},
            {**contract(), "extend_all": Program("extend_all", x=X)},
        ),
        "CC3": (
            {("CC3", error)},
            each_transformer(lambda kind, context, length: transformer(kind, context, length, 320)),
        ),
        "CC4, no prefill": ({("CC4", error)}, replaced(prompt_opt_256_64=None)),
        "CC4, no pair": ({("CC4", error)}, replaced(extend_512_8=None)),
        "CC4, no gather": ({("CC4", error)}, replaced(gather_embeddings_8=None)),
        "CC4, a window across": ({("CC4", error)}, contract(windows=(8, 24))),
        "CC4, contexts": ({("CC4", "warning")}, contract(contexts=(384,))),
        "CC5": (
            {("CC5", error)},
            replaced(extend_512_8=retyped(extend, "out_logits", "tensor<1x1x8x500xf16>")),
        ),
        "CC7": (
            {("CC7", error)},
            replaced(
                extend_512_8=retyped(
                    transformer("extend", 512, 8),
                    "key_cache",
                    "!coreai.handle<tensor<2x1x64x1x512xf16, #coreaix.hw_constraints<IOSurface>>>",
                )
            ),
        ),
        "CC6": (
            {("CC6", "warning")},
            each_transformer(functional),
        ),
    }


@pytest.mark.parametrize("case", mistakes())
def test_what_breaks_the_contract_is_found(case: str) -> None:
    expected, programs = mistakes()[case]
    assert broken(CONTRACT_RULES, linted(programs)) == expected


@pytest.mark.parametrize(
    "programs",
    [
        contract(),
        contract(contexts=(256,), windows=(2,)),
        {**contract(), "helper": Program("helper", x=X)},
        replaced(load_embeddings=contract()["load_embeddings"].give(more=X)),
    ],
)
def test_the_contract_itself_is_sound(programs: dict[str, Program]) -> None:
    functions = listing(*programs.values())
    assert broken(CONTRACT_RULES, linted(programs)) == set()
    assert {found for function in functions for found in broken(FUNCTION_RULES, function)} == set()


def test_caches_that_nobody_sees_are_an_error() -> None:
    programs = contract()
    for name in ("key_cache", "value_cache"):
        del programs["extend_256_8"].inputs[name]
    programs["extend_256_8"].types = list(programs["extend_256_8"].inputs.values())
    assert ("CC6", "error") in broken(CONTRACT_RULES, linted(programs))


def test_every_rule_has_a_breach() -> None:
    covered = {case.partition(",")[0] for case in (*BREACHES, *PORTS, *mistakes(), *FILES, "CF1", "CF5")}
    rules = (*FUNCTION_RULES, *CONTRACT_RULES, *FILE_RULES, *BLOB_RULES)
    assert sorted(rule.id for rule in rules) == sorted(covered)


# Files: a bundle whose program is none.


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    asset = folder / "m.aimodel"
    asset.mkdir(parents=True)
    (asset / PROGRAM).write_bytes(b"program")
    (asset / HASH).write_bytes(hashlib.sha256(b"program").digest())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    write_metadata(folder)
    return folder


def write_metadata(folder: Path, **own: Any) -> None:
    content = {
        "metadata_version": "0.2",
        "kind": "llm",
        "name": "m",
        "assets": {"main": "m.aimodel"},
        "language": {"tokenizer": "tokenizer", "vocab_size": 512, "max_context_length": 512},
        **own,
    }
    (folder / METADATA).write_text(json.dumps({key: value for key, value in content.items() if value}))


LANGUAGE = {"tokenizer": "tokenizer", "vocab_size": 512, "max_context_length": 512}
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "CF2": ("error", {"metadata_version": "0.1"}),
    "CF2, a kind": ("error", {"kind": "text"}),
    "CF2, no name": ("error", {"name": None}),
    "CF2, an asset": ("error", {"assets": {"main": "other.aimodel"}}),
    "CF2, an asset elsewhere": ("error", {"assets": {"main": "../bundle/m.aimodel"}}),
    "CF3": ("error", {"language": None}),
    "CF3, a size": ("error", {"language": {**LANGUAGE, "vocab_size": "512"}}),
    "CF3, a source": ("error", {"source": {"model_definition": "torch"}}),
    "CF4": ("warning", {"language": {**LANGUAGE, "embedded_tokenizer": False}}),
}


@pytest.mark.parametrize("case", FILES)
def test_metadata_that_the_runner_refuses(bundle: Path, case: str) -> None:
    severity, own = FILES[case]
    write_metadata(bundle, **own)
    expected = {(case.partition(",")[0], severity)}
    assert broken(FILE_RULES, Linted(bundle / "m.aimodel", bundle)) == expected


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_metadata_that_is_none(bundle: Path, text: str) -> None:
    (bundle / METADATA).write_text(text)
    assert broken(FILE_RULES, Linted(bundle / "m.aimodel", bundle)) == {("CF2", "error")}


def test_a_sound_bundle(bundle: Path) -> None:
    assert broken(FILE_RULES, Linted(bundle / "m.aimodel", bundle)) == set()
    write_metadata(bundle, source={"model_definition": "torch", "hf_model_id": "a/b"})
    assert broken(FILE_RULES, Linted(bundle / "m.aimodel", bundle)) == set()


def test_a_missing_tokenizer(bundle: Path) -> None:
    (bundle / "tokenizer" / "tokenizer.json").unlink()
    assert broken(FILE_RULES, Linted(bundle / "m.aimodel", bundle)) == {("CF4", "error")}


def test_a_program_that_has_changed_is_not_parsed(bundle: Path) -> None:
    (bundle / "m.aimodel" / PROGRAM).write_bytes(b"another")
    (finding,) = lint_bundle(bundle)
    assert (finding.rule, finding.severity) == ("CF1", "error") and "not looked at" in finding.detail


def test_a_folder_that_is_no_asset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'main.mlirb' is missing"):
        lint_asset(tmp_path)


def test_contexts_and_vocabulary_are_metadata_s(bundle: Path) -> None:
    functions = listing(*contract().values())
    assert broken(CONTRACT_RULES, Linted(bundle / "m.aimodel", bundle, functions)) == set()
    write_metadata(bundle, language={**LANGUAGE, "max_context_length": 4096})
    assert broken(CONTRACT_RULES, Linted(bundle / "m.aimodel", bundle, functions)) == {("CC3", "error")}
    write_metadata(bundle, language={**LANGUAGE, "vocab_size": 500})
    assert broken(CONTRACT_RULES, Linted(bundle / "m.aimodel", bundle, functions)) == {("CC5", "error")}


# What the parser tells.


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("tensor<1x8xf16>", Form("float16", (1, 8))),
        ("tensor<f32>", Form("float32", ())),
        ("tensor<4x?xsi8>", Form("int8", (4, None))),
        ("tensor<2xui4>", Form("uint4", (2,))),
        ("tensor<2xi1>", Form("bool", (2,))),
        ("tensor<2xbf16>", Form("bfloat16", (2,))),
        ("tensor<2xf8E4M3FN>", Form("f8e4m3fn", (2,))),
        ("!coreai.handle<tensor<4x1x64x1x256xf16>>", Form("float16", (4, 1, 64, 1, 256), True)),
        ("tensor<2xf16, #coreai.hw<a = [1]>>", Form("float16", (2,), False, "#coreai.hw<a = [1]>")),
        ("!coreai.token", Form("token", ())),
        ("!coreai.image<1x2>", Form("opaque", ())),
    ],
)
def test_types_as_mlir_prints_them(text: str, form: Form) -> None:
    assert read_form(text) == form


@pytest.mark.parametrize("code", [1, -6])
def test_a_parser_that_fails_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """In the place of the worker is a process that ends as it would."""
    script = f"import os, sys; sys.stderr.write('a\\nlast words'); sys.stderr.flush(); os.{_end(code)}"
    monkeypatch.setattr(worker_process, "make_command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setattr(listings_module, "require_installed", lambda: None)
    how = "signal 6 (SIGABRT)" if code < 0 else "exit code 1"
    with pytest.raises(InputError) as failed:
        read_listing(tmp_path)
    assert failed.value.what == f"Apple's parser ended with {how} while it read the functions: last words"


def _end(code: int) -> str:
    return "abort()" if code < 0 else f"_exit({code})"


def test_a_parser_that_hangs_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(worker_process, "make_command", lambda *_: sleeping)
    monkeypatch.setattr(listings_module, "require_installed", lambda: None)
    monkeypatch.setattr(listings_module, "LONGEST", 0.2)
    with pytest.raises(InputError, match=r"did not answer within 0.2 s while it read the functions"):
        read_listing(tmp_path)


# Our own assets.


@pytest.fixture(scope="module")
def own_bundle(
    tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path, quantize_model: Callable[..., Quantized]
) -> Path:
    folder = tmp_path_factory.mktemp("linted") / "bundle"
    lower(LowerRequest(quantize_model(tiny_qwen2, "w4-nearest").folder, AssetOptions(256, (8,))), folder)
    return folder


@needs_coreai
@pytest.mark.parametrize("kv", ["state", "functional"])
@pytest.mark.parametrize("overrides", [{}, {"embedding_bits": 8, "head_bits": 4, "r3": "hadamard"}])
def test_our_own_assets_break_no_rule(
    tmp_path: Path,
    tiny_qwen2: Path,
    quantize_model: Callable[..., Quantized],
    overrides: dict[str, Any],
    kv: str,
) -> None:
    quantized = quantize_model(tiny_qwen2, "w4-nearest", **overrides)
    lower(LowerRequest(quantized.folder, AssetOptions(512, (8, 64), kv)), tmp_path / "bundle")
    found = {(finding.rule, finding.severity) for finding in lint_bundle(tmp_path / "bundle")}
    assert found <= {("CO3", "warning"), ("CC6", "warning")}
    assert (("CC6", "warning") in found) == (kv == "functional")


@needs_coreai
def test_a_blob_with_infinities(own_bundle: Path, tmp_path: Path) -> None:
    """A scale is overwritten in the file, which gets the hash of what it is then."""
    shutil.copytree(own_bundle, tmp_path / "bundle")
    asset = find_asset(tmp_path / "bundle")
    blob = StoredAsset(asset).blobs["model.layers.0.mlp.down_proj.output_scale"]
    data = bytearray((asset / PROGRAM).read_bytes())
    data[blob.start : blob.start + 2] = np.float16(np.inf).tobytes()
    (asset / PROGRAM).write_bytes(data)
    (asset / HASH).write_bytes(hashlib.sha256(data).digest())
    errors = [finding for finding in lint_bundle(tmp_path / "bundle") if finding.severity == "error"]
    assert [(finding.rule, finding.op) for finding in errors] == [("CF5", blob.name)]


@needs_coreai
def test_metadata_and_functions_that_do_not_go_together(own_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(own_bundle, tmp_path / "bundle")
    content = json.loads((own_bundle / METADATA).read_text(encoding="utf-8"))
    content["language"] |= {"max_context_length": 1024, "vocab_size": 1}
    (tmp_path / "bundle" / METADATA).write_text(json.dumps(content))
    errors = {finding.rule for finding in lint_bundle(tmp_path / "bundle") if finding.severity == "error"}
    assert errors == {"CC3", "CC5"}


@needs_coreai
def test_the_command_takes_a_bundle_and_an_asset(own_bundle: Path) -> None:
    for path in (own_bundle, find_asset(own_bundle)):
        result = invoke("lint", path, "--json")
        assert result.exit_code == 0, result.stderr
        findings = [Finding(**item) for item in json.loads(result.stdout)["findings"]]
        assert {finding.rule for finding in findings} <= {"CO3"}


def test_without_core_ai_lint_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UnsupportedError("coreai-core is not installed")

    monkeypatch.setattr(listings_module, "require_installed", refuse)
    with pytest.raises(UnsupportedError, match="not installed"):
        lint_bundle(bundle)
