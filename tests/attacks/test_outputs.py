"""Outputs that someone edited, cut or made up: `verify` says what is wrong, with exit code 6.

Where hashes would tell already, the manifest is made to agree, so that the check behind them has to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import Damage, assert_refused, parts, raw
from running import succeed

from anequant.errors import InputError, VerificationError
from anequant.targets.coreml.program.package import MODEL_FILE, WEIGHT_FILE
from anequant.targets.coreml.toolkit import Model_pb2

pytestmark = pytest.mark.usefixtures("warm")

FAILED, BAD = VerificationError.exit_code, InputError.exit_code
MANIFEST, SHARD, META = "anequant.json", "model.safetensors", "meta.yaml"
HEAD, CHUNK = "qwen25_lm_head.mlpackage", "qwen25_FFN_PF_lut4_chunk_01of01.mlpackage"
LINEAR = "model.layers.0.mlp.gate_proj"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="session")
def written(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantized checkpoint, one with static activations, and packages."""
    place = tmp_path_factory.mktemp("written")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
    model = make_model(place / "model", "qwen2", False, **sizes)
    (place / "ids.json").write_text(json.dumps([list(range(16))] * 4))
    static = ("--activation-bits", 8, "--activation-scales", "static", "--rounding", "nearest")
    calibration = ("--calib", place / "ids.json", "--calib-length", 16)
    nearest = ("--recipe", "w4-nearest")
    for words in (
        ("quantize", model, "-o", place / "checkpoint", *nearest),
        ("quantize", model, "-o", place / "static", *nearest, *static, *calibration),
        ("lower", place / "checkpoint", "-o", place / "packages", "--context", 16, "--batch", 8),
    ):
        succeed(*words, "--quiet")
    return place


@pytest.fixture
def copies(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "place"))


def edit(file: Path, change: Change) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def manifest(change: Change) -> Damage:
    return lambda folder: edit(folder / MANIFEST, change)


def agreeing(damage: Damage) -> Damage:
    """After the damage, the manifest lists what is there."""

    def both(folder: Path) -> None:
        damage(folder)
        files = {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        edit(folder / MANIFEST, lambda values: values.update(files=files))

    return both


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def truncated(name: str, left: float) -> Damage:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * left))


def numbers(suffix: str, change: Callable[[Any], Any], kind: Any = np.float32) -> Damage:
    """Other numbers in one of the linear's tensors."""

    def damage(folder: Path) -> None:
        header, data = parts(folder / SHARD)
        begin, end = header[f"{LINEAR}.{suffix}"]["data_offsets"]
        values = np.frombuffer(data[begin:end], kind).copy()
        change(values)
        raw(folder / SHARD, json.dumps(header).encode(), data[:begin] + values.tobytes() + data[end:])

    return agreeing(damage)


def at(place: Any, value: float) -> Callable[[Any], Any]:
    return lambda values: values.__setitem__(place, value)


def header(change: Change) -> Damage:
    def damage(folder: Path) -> None:
        entries, data = parts(folder / SHARD)
        change(entries)
        raw(folder / SHARD, json.dumps(entries).encode(), data)

    return agreeing(damage)


def retyped(name: str, **changes: Any) -> Damage:
    return header(lambda entries: entries[name].update(changes))


def config(change: Change) -> Damage:
    return agreeing(lambda folder: edit(folder / "config.json", change))


def recipe(**changes: Any) -> Damage:
    return manifest(lambda values: values["recipe"].update(changes))


CHECKPOINTS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "manifest: not json": (text(MANIFEST, "{"), ("'anequant.json' cannot be read",)),
    "manifest: empty": (text(MANIFEST, ""), ("'anequant.json' cannot be read",)),
    "manifest: a list": (text(MANIFEST, "[]"), ("'anequant.json'",)),
    "manifest: another format": (
        manifest(lambda values: values.update(format=99)),
        ("not one this version",),
    ),
    "manifest: unknown kind": (manifest(lambda values: values.update(kind="x")), ("unknown kind 'x'",)),
    "manifest: kind a list": (manifest(lambda values: values.update(kind=[])), ("unknown kind []",)),
    "manifest: no files": (manifest(lambda values: values.pop("files")), ("has no 'files'",)),
    "manifest: no versions": (manifest(lambda values: values.update(versions=3)), ("has no 'versions'",)),
    "manifest: no recipe": (manifest(lambda values: values.pop("recipe")), ("has no 'recipe'",)),
    "manifest: unknown key": (recipe(bitz=4), ("impossible recipe: unknown recipe key 'bitz'",)),
    "manifest: impossible bits": (recipe(bits=5), ("impossible recipe: recipe key 'bits'",)),
    "manifest: parent folder": (
        manifest(lambda values: values["files"].update({"../model/config.json": "0" * 64})),
        ("impossible file '../model/config.json'",),
    ),
    "manifest: absolute": (
        manifest(lambda values: values["files"].update({"/etc/passwd": "0" * 64})),
        ("impossible file '/etc/passwd'",),
    ),
    "manifest: an escape": (
        manifest(lambda values: values["files"].update({"\x1b[2J": "0" * 64})),
        ("impossible file", r"\x1b[2J"),
    ),
    "manifest: no hash": (
        manifest(lambda values: values["files"].update({SHARD: "abc"})),
        (f"no sha256 for '{SHARD}'",),
    ),
    "file missing": (removed(SHARD), (f"'{SHARD}' is missing",)),
    "file unlisted": (text("extra.bin", "mine"), ("'extra.bin' is not one that anequant wrote",)),
    "file changed": (text("config.json", "{}"), ("'config.json' has changed",)),
    "file truncated": (truncated(SHARD, 0.5), (f"'{SHARD}' has changed",)),
    "a pipe": (lambda folder: os.mkfifo(folder / "p"), ("'p' is neither file nor folder",)),
    "a link to nothing": (lambda folder: (folder / "l").symlink_to("x"), ("'l' is neither file nor folder",)),
    "weights truncated": (agreeing(truncated(SHARD, 0.5)), (f"'{SHARD}'", "truncated")),
    "config edited": (config(lambda values: values.update(hidden_size=32)), ("has shape",)),
    "config of no model": (
        config(lambda values: values.update(model_type="gpt2")),
        ("unknown architecture",),
    ),
    "tensor missing": (
        header(lambda entries: entries.update(other=entries.pop(f"{LINEAR}.codebook"))),
        (f"'{LINEAR}.codebook' is missing",),
    ),
    "tensor unknown": (
        header(lambda entries: entries.update({f"{LINEAR}.x": entries["model.norm.weight"]})),
        ("overlap",),
    ),
    "scales of another shape": (
        retyped(f"{LINEAR}.output_scales", shape=[1, 64]),
        (f"'{LINEAR}.output_scales' is F32 [1, 64]", "F32 [64, 1]"),
    ),
    "a codebook of 8 entries": (
        retyped(f"{LINEAR}.codebook", shape=[2, 8]),
        (f"'{LINEAR}.codebook' is F32 [2, 8]", "F32 [16]"),
    ),
    "integers as weight": (
        retyped(f"{LINEAR}.weight", dtype="I16"),
        (f"'{LINEAR}.weight' is I16",),
    ),
    "another recipe's bits": (recipe(bits=8, codebook="lut"), ("q_proj.codebook' is F32 [16]", "F32 [256]")),
    "a quantized head that is none": (recipe(head_bits=8), ("'lm_head.input_scales' is missing",)),
    "codebook nan": (numbers("codebook", at(3, np.nan)), (f"'{LINEAR}.codebook' holds 1 values", SHARD)),
    "codebook of finer numbers": (numbers("codebook", at(3, 0.1)), (f"'{LINEAR}.codebook'", "float16")),
    "codebook descending": (
        numbers("codebook", lambda values: values.__setitem__(slice(None), values[::-1].copy())),
        (f"'{LINEAR}.codebook' does not ascend", SHARD),
    ),
    "input scale zero": (numbers("input_scales", at(3, 0.0)), ("input_scales' holds 1 scales", "positive")),
    "input scale negative": (numbers("input_scales", at(3, -1.0)), ("input_scales' holds 1 scales",)),
    "input scale infinite": (numbers("input_scales", at(3, np.inf)), (f"'{LINEAR}.input_scales' holds 1",)),
    "output scale zero": (numbers("output_scales", at(3, 0.0)), ("output_scales' holds 1 zeros",)),
    "output scale nan": (numbers("output_scales", at(3, np.nan)), ("output_scales' holds 1 values",)),
    "output scale beyond float16": (numbers("output_scales", at(3, 1e6)), ("output_scales'", "float16")),
    "output scale of another sign": (
        numbers("output_scales", lambda values: values.__imul__(-1)),
        (f"the weight of '{LINEAR}' is not what its codes say",),
    ),
    "bias nan": (numbers("bias", at(0, np.nan), np.float16), (f"'{LINEAR}.bias' holds 1 values",)),
    "bias too large for its scale": (
        numbers("bias", at(0, 6e4), np.float16),
        (f"'{LINEAR}.bias' is", "times its output scale"),
    ),
    "a weight between two entries": (
        numbers(
            "weight",
            lambda values: values.view(np.uint16).__setitem__(7, values.view(np.uint16)[7] ^ 1),
            np.float16,
        ),
        (f"the weight of '{LINEAR}' is not what its codes say",),
    ),
}


def static(value: Any, name: str = LINEAR) -> Damage:
    return config(lambda values: values["quantization_config"]["static_scales"].update({name: value}))


STATICS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "zero": (static(0.0), (f"no static scale for '{LINEAR}'",)),
    "negative": (static(-1.0), (f"no static scale for '{LINEAR}'",)),
    "a word": (static("1"), (f"no static scale for '{LINEAR}'",)),
    "missing": (
        config(lambda values: values["quantization_config"]["static_scales"].pop(LINEAR)),
        (f"no static scale for '{LINEAR}'",),
    ),
    "beyond float16": (static(1e9), (f"the static scale of '{LINEAR}' is 1e+09",)),
    "below float16": (static(1e-12), (f"the static scale of '{LINEAR}' is 1e-12",)),
    "of nothing": (static(1.0, "lm_head"), ("the static scale of 'lm_head' is of no linear",)),
    "another format": (
        config(lambda values: values["quantization_config"].update(format=9)),
        ("not one that this version reads",),
    ),
}


def item(change: Change) -> Damage:
    """Other items in the head's Manifest.json."""
    return agreeing(lambda folder: edit(folder / HEAD / "Manifest.json", change))


def path_of_model(path: Any) -> Damage:
    def change(values: dict[str, Any]) -> None:
        values["itemInfoEntries"][values["rootModelIdentifier"]]["path"] = path

    return item(change)


def model(change: Callable[[Any], None], package: str = HEAD) -> Damage:
    """Another protobuf."""

    def damage(folder: Path) -> None:
        file = folder / package / MODEL_FILE
        program = Model_pb2.Model()
        program.ParseFromString(file.read_bytes())
        change(program)
        file.write_bytes(program.SerializeToString(deterministic=True))

    return agreeing(damage)


def blobs(program: Any) -> list[Any]:
    """Every value that lies in the weight file."""
    found = []
    for function in program.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                values = [*operation.attributes.values()]
                for argument in operation.inputs.values():
                    values += [binding.value for binding in argument.arguments]
                found += [value for value in values if value.WhichOneof("value") == "blobFileValue"]
    return found


def first_blob(**changes: Any) -> Damage:
    def change(program: Any) -> None:
        for key, value in changes.items():
            setattr(blobs(program)[0].blobFileValue, key, value)

    return model(change)


def metadata(place: int, value: int) -> Damage:
    """Another number in the head of the weight file's first blob: 8 its size, 16 its offset."""

    def damage(folder: Path) -> None:
        file = folder / HEAD / WEIGHT_FILE
        content = bytearray(file.read_bytes())
        content[64 + place : 72 + place] = value.to_bytes(8, "little")
        file.write_bytes(content)

    return agreeing(damage)


def short_codebook(program: Any) -> None:
    """The table of the first palettized weight loses half of its entries; the codes stay."""
    for function in program.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                if operation.type == "constexpr_lut_to_dense":
                    table = operation.inputs["lut"].arguments[0].value
                    table.type.tensorType.dimensions[-2].constant.size = 8
                    return


def pipe(folder: Path) -> None:
    (folder / HEAD / WEIGHT_FILE).unlink()
    os.mkfifo(folder / HEAD / WEIGHT_FILE)


def meta(old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / META).read_text()
        assert old in content
        (folder / META).write_text(content.replace(old, new))

    return agreeing(damage)


PACKAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "weights truncated": (truncated(f"{HEAD}/{WEIGHT_FILE}", 0.5), ("weight.bin' has changed",)),
    "weights truncated, agreeing": (
        agreeing(truncated(f"{HEAD}/{WEIGHT_FILE}", 0.5)),
        ("cannot read a fp16 constant", "weight.bin"),
    ),
    "weights empty": (agreeing(truncated(f"{HEAD}/{WEIGHT_FILE}", 0)), ("cannot read", "weight.bin")),
    "weights missing": (
        agreeing(removed(f"{HEAD}/{WEIGHT_FILE}")),
        ("cannot read", "no such file"),
    ),
    "a pipe as weights": (
        agreeing(pipe),
        ("is neither file nor folder",),
    ),
    "blob beyond the end": (first_blob(offset=2**40), ("cannot read a fp16 constant", "1099511627776")),
    "blob of 2**63": (first_blob(offset=2**63), ("cannot read a fp16 constant",)),
    "blob in the middle": (first_blob(offset=72), ("cannot read a fp16 constant at offset 72",)),
    "blob larger than the file": (metadata(8, 2**62), ("cannot read a fp16 constant",)),
    "blob that lies beyond the file": (metadata(16, 2**40), ("cannot read a fp16 constant",)),
    "blob smaller than its shape": (metadata(8, 2), ("a constant of shape",)),
    "blob elsewhere": (
        first_blob(fileName="@model_path/../../../../anequant.json"),
        ("leaves the package",),
    ),
    "blob at an absolute path": (first_blob(fileName="/etc/passwd"), ("leaves the package",)),
    "a code outside the codebook": (model(short_codebook, CHUNK), ("its codebook has 8 entries", CHUNK)),
    "manifest: not json": (
        agreeing(text(f"{HEAD}/Manifest.json", "{")),
        ("does not name a root model", "Manifest.json"),
    ),
    "manifest: missing": (agreeing(removed(f"{HEAD}/Manifest.json")), ("not a Core ML package", HEAD)),
    "manifest: parent folder": (path_of_model("../../meta.yaml"), ("leaves the package",)),
    "manifest: absolute": (path_of_model("/etc/passwd"), ("leaves the package",)),
    "manifest: drive": (path_of_model("C:x"), ("leaves the package",)),
    "manifest: path a number": (path_of_model(3), ("does not name a root model",)),
    "manifest: model elsewhere": (path_of_model("com.apple.CoreML/x"), ("model file is missing",)),
    "manifest: another root": (
        item(lambda values: values.update(rootModelIdentifier="x")),
        ("does not name a root model",),
    ),
    "manifest: an item too many": (
        item(lambda values: values["itemInfoEntries"].update(x={"path": "com.apple.CoreML/x"})),
        ("'Data/com.apple.CoreML/x', which the manifest lists, is missing",),
    ),
    "manifest: an item that leaves": (
        item(lambda values: values["itemInfoEntries"].update(x={"path": "../../meta.yaml"})),
        ("leaves the package",),
    ),
    "manifest: an item twice": (
        item(lambda values: values["itemInfoEntries"].update(x={"path": "com.apple.CoreML/weights"})),
        ("without a path of their own",),
    ),
    "a file that no item lists": (
        agreeing(text(f"{HEAD}/Data/more.bin", "mine")),
        ("'Data/more.bin' is in no item",),
    ),
    "a file beside the data": (agreeing(text(f"{HEAD}/more.bin", "mine")), ("'more.bin' is in no item",)),
    "model: empty": (agreeing(text(f"{HEAD}/{MODEL_FILE}", "")), ("not mlProgram", HEAD)),
    "model: noise": (agreeing(text(f"{HEAD}/{MODEL_FILE}", "\x7f" * 100)), ("model file is damaged",)),
    "model: no block": (
        model(lambda program: program.mlProgram.functions["main"].ClearField("block_specializations")),
        ("no block for the opset",),
    ),
    "package missing": (
        agreeing(lambda folder: shutil.rmtree(folder / HEAD)),
        (f"package '{HEAD}' is missing; model_prefix and lut_lmhead of meta.yaml name it so",),
    ),
    "package too many": (
        agreeing(lambda folder: shutil.copytree(folder / HEAD, folder / "more.mlpackage")),
        ("package 'more.mlpackage' is none of meta.yaml",),
    ),
    "meta: not yaml": (agreeing(text(META, "[")), ("'meta.yaml' cannot be read",)),
    "meta: empty": (agreeing(text(META, "")), ("'meta.yaml' lacks or misstates",)),
    "meta: a python object": (
        agreeing(text(META, "!!python/object/apply:os.system [ls]")),
        ("'meta.yaml' cannot be read", "constructor"),
    ),
    "meta: prefix of another folder": (
        meta("model_prefix: qwen25", "model_prefix: ../x"),
        ("model_prefix, it is '../x'",),
    ),
    "meta: a billion chunks": (meta("num_chunks: 1", "num_chunks: 1000000000"), ("num_chunks, it is",)),
    "meta: no part of a head": (meta("split_lm_head: 16", "split_lm_head: 0"), ("split_lm_head, it is 0",)),
    "meta: another context": (
        meta("context_length: 16", "context_length: 32"),
        ("'context_length' of meta.yaml is 32", f"'{CHUNK}' is made for 16"),
    ),
    "meta: another batch": (
        meta("batch_size: 8", "batch_size: 4"),
        ("'batch_size' of meta.yaml is 4", "is made for 8"),
    ),
    "meta: half of the head": (
        meta("split_lm_head: 16", "split_lm_head: 8"),
        ("'split_lm_head' of meta.yaml is 8", f"'{HEAD}' is made for 16"),
    ),
    "meta: another width": (
        meta("lut_lmhead: none", "lut_lmhead: 6"),
        ("_lm_head_lut6.mlpackage' is missing; model_prefix and lut_lmhead of meta.yaml",),
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_an_edited_checkpoint(copies: Path, case: str) -> None:
    damage, words = CHECKPOINTS[case]
    damage(copies / "checkpoint")
    assert_refused(copies, ["verify", copies / "checkpoint"], FAILED, *words)


@pytest.mark.parametrize("case", STATICS)
def test_edited_static_scales(copies: Path, case: str) -> None:
    damage, words = STATICS[case]
    damage(copies / "static")
    assert_refused(copies, ["verify", copies / "static"], FAILED, *words)


@pytest.mark.parametrize("case", PACKAGES)
def test_edited_packages(copies: Path, case: str) -> None:
    """Without the checkpoint that they were made from: none of this needs it."""
    damage, words = PACKAGES[case]
    damage(copies / "packages")
    assert_refused(copies, ["verify", copies / "packages"], FAILED, *words)


@pytest.mark.parametrize("case", ["blob of 2**63", "a code outside the codebook", "manifest: drive"])
def test_edited_packages_with_their_checkpoint(copies: Path, case: str) -> None:
    damage, words = PACKAGES[case]
    damage(copies / "packages")
    arguments = ["verify", copies / "packages", "--checkpoint", copies / "checkpoint"]
    assert_refused(copies, arguments, FAILED, *words)


def test_the_copies_are_sound(copies: Path) -> None:
    for words in (
        ("verify", copies / "checkpoint"),
        ("verify", copies / "static"),
        ("verify", copies / "packages", "--checkpoint", copies / "checkpoint"),
    ):
        succeed(*words)


def test_what_is_no_output_at_all(copies: Path) -> None:
    for folder in ("model", "nowhere"):
        words = ("'anequant.json' is missing",)
        assert_refused(copies, ["verify", copies / folder], BAD, *words)


def test_a_checkpoint_where_packages_are_due(copies: Path) -> None:
    (copies / "both").mkdir()
    for name in ("checkpoint", "packages"):
        shutil.copytree(copies / "packages", copies / "both" / name)
    values = json.loads((copies / "packages" / MANIFEST).read_text())
    (copies / "both" / MANIFEST).write_text(
        json.dumps({**values, "kind": "conversion", "recipe": {}, "measured": {}})
    )
    agreeing(lambda folder: None)(copies / "both")
    files = {
        f"{name}/{MANIFEST}": hashlib.sha256((copies / "packages" / MANIFEST).read_bytes()).hexdigest()
        for name in ("checkpoint", "packages")
    }
    edit(copies / "both" / MANIFEST, lambda values: values["files"].update(files))
    assert_refused(copies, ["verify", copies / "both"], FAILED, "is of the kind 'packages'")


def test_reading_packages_refuses_the_same_files(copies: Path) -> None:
    """What verify finds in a package's files, opening it for generation or lint finds too."""
    path_of_model("../../meta.yaml")(copies / "packages")
    assert_refused(copies, ["lint", copies / "packages"], BAD, "leaves the package")
