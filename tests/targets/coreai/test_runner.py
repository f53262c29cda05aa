"""What happens when Apple's package fails: each failure is one named error, and nothing is left behind.

Where coreai-core is installed a real asset is damaged, killed and delayed; the rest holds everywhere.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Quantized
from running import invoke

from anequant.checkpoints.places import BUNDLE_KIND
from anequant.errors import UnsupportedError, VerificationError
from anequant.lower_options import AssetOptions
from anequant.pipeline.lower import lower
from anequant.request import LowerRequest
from anequant.targets.coreai import assemble, installed, runner, worker_process
from anequant.targets.coreai.bundle import find_asset, read_design
from anequant.targets.coreai.design import MASKED, TABLE, Design, Sizes, list_functions
from anequant.targets.coreai.host import Window, choose_window, make_functional_mask, make_mask
from anequant.targets.coreai.installed import VERSION, find_problem
from anequant.targets.coreai.messages import receive, send
from anequant.targets.coreai.runner import Runner

needs_coreai = pytest.mark.skipif(find_problem() is not None, reason="needs coreai-core")
OPTIONS = AssetOptions(256, (8,))
CONSTANT = {"dtype": "float16", "shape": [1, 8, 1, 1]}
DESIGN = Design(Sizes(2, 64, 96, 4, 2, 16, 100), 1024, (8, 16, 64), "state", {}, {}, (1e-6, 1e-6))


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path, quantize_model: Callable[..., Quantized]
) -> tuple[Path, Path]:
    """A checkpoint, and its bundle."""
    checkpoint = quantize_model(tiny_qwen2, "w4-nearest").folder
    bundle = tmp_path_factory.mktemp("bundle") / "bundle"
    lower(LowerRequest(checkpoint, OPTIONS), bundle)
    return checkpoint, bundle


def fail(*words: object) -> tuple[int, str]:
    """Run a command that fails without a traceback, in three lines; its exit code, and what it said."""
    ran = invoke(*words)
    assert "Traceback" not in ran.stderr and ran.exit_code not in (0, 1)
    return ran.exit_code, ran.stderr


@needs_coreai
def test_a_runtime_that_is_killed_is_named(made: tuple[Path, Path]) -> None:
    design, _ = read_design(made[1])
    functions = {ports.name: ports for ports in list_functions(design)}
    with Runner(find_asset(made[1])) as running:
        os.kill(running._process.pid, signal.SIGKILL)
        with pytest.raises(VerificationError, match="SIGKILL") as failed:
            running.run(functions["load_embeddings"], {}, keep=[TABLE])
    assert "load_embeddings" in failed.value.what and failed.value.where.endswith(".aimodel")
    assert failed.value.remedy


@needs_coreai
def test_a_runtime_that_hangs_is_ended(made: tuple[Path, Path]) -> None:
    with Runner(find_asset(made[1]), longest=60) as running:
        os.kill(running._process.pid, signal.SIGSTOP)
        running._longest = 0.5
        with pytest.raises(VerificationError, match=r"did not answer within 0\.5 s"):
            running.forget()
        assert running._process.poll() is not None


@needs_coreai
def test_what_the_runtime_refuses_is_told(made: tuple[Path, Path]) -> None:
    design, _ = read_design(made[1])
    functions = {ports.name: ports for ports in list_functions(design)}
    with Runner(find_asset(made[1])) as running, pytest.raises(VerificationError, match="refuses"):
        running.run(functions["gather_embeddings_8"], {"in_new_token_ids": np.zeros((1, 8), np.int32)})


@needs_coreai
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_asset_is_refused(made: tuple[Path, Path], share: float, tmp_path: Path) -> None:
    checkpoint, bundle = made
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    program = find_asset(copy) / assemble.PROGRAM
    program.write_bytes(program.read_bytes()[: int(share * program.stat().st_size)])
    code, said = fail("verify", copy, "--checkpoint", checkpoint)
    assert code == 6 and "main.mlirb' has changed" in said
    code, said = fail("generate", copy, "--prompt", "In the morning")
    assert code == 6 and "Apple's runtime" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@needs_coreai
@pytest.mark.parametrize(
    "place", ["codes", "codebook", "output_scale", "input_scale", "bias", "weight", "rope.cos"]
)
def test_one_changed_bit_of_a_constant_is_found(made: tuple[Path, Path], place: str, tmp_path: Path) -> None:
    """Also where all hashes were made anew."""
    from anequant.checkpoints.manifest import MANIFEST
    from anequant.jobs.output_folder import hash_files
    from anequant.targets.coreai.stored import StoredAsset

    checkpoint, bundle = made
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    asset = find_asset(copy)
    names = [name for name in StoredAsset(asset).blobs if name.endswith(place)]
    blob = StoredAsset(asset).blobs[names[len(names) // 2]]
    program = bytearray((asset / assemble.PROGRAM).read_bytes())
    program[blob.start + blob.size // 2] ^= 1
    (asset / assemble.PROGRAM).write_bytes(program)
    code, said = fail("verify", copy, "--checkpoint", checkpoint)
    assert code == 6 and "has changed" in said
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"] = hash_files(copy, sorted(manifest["files"]))
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    code, said = fail("verify", copy, "--checkpoint", checkpoint)
    assert code == 6 and "main.hash' is not the hash" in said
    (asset / assemble.HASH).write_bytes(
        bytes.fromhex(hash_files(asset, [assemble.PROGRAM])[assemble.PROGRAM])
    )
    manifest["files"] = hash_files(copy, sorted(manifest["files"]))
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    code, said = fail("verify", copy, "--checkpoint", checkpoint)
    assert code == 6 and f"'{blob.name}' is not the checkpoint's" in said


@needs_coreai
@pytest.mark.parametrize("change", ["eps", "steps", "constants", "headroom"])
def test_a_changed_design_is_found(made: tuple[Path, Path], change: str, tmp_path: Path) -> None:
    """Also a scale too many: what no function needs is none of the checkpoint's."""
    from anequant.checkpoints.manifest import MANIFEST
    from anequant.jobs.output_folder import hash_files

    checkpoint, bundle = made
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    content = json.loads((copy / "design.json").read_text(encoding="utf-8"))
    changed: dict[str, Any] = {
        "eps": {"eps": [1e-5, 1e-6]},
        "steps": {"steps": {"model.layers.0.mlp.up_proj": 0.5}},
        "constants": {"constants": {**content["design"]["constants"], "x.input_scale": CONSTANT}},
    }
    if change == "headroom":
        content["headroom"]["residual_scale"] = 0.5
    else:
        content["design"] |= changed[change]
    (copy / "design.json").write_text(json.dumps(content), encoding="utf-8")
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"] = hash_files(copy, sorted(manifest["files"]))
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    code, said = fail("verify", copy, "--checkpoint", checkpoint)
    assert code == 6 and "is not the checkpoint's" in said


@needs_coreai
def test_another_checkpoint_is_refused(
    made: tuple[Path, Path], tiny_qwen2: Path, quantize_model: Callable[..., Quantized]
) -> None:
    other = quantize_model(tiny_qwen2, "w4-nearest", seed=5).folder
    code, said = fail("verify", made[1], "--checkpoint", other)
    assert code == 6 and "was not made from" in said
    code, said = fail("verify", made[1])
    assert code == 2 and "an asset only" in said and "--checkpoint" in said


@needs_coreai
def test_authoring_that_fails_leaves_nothing(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "MODULE", "anequant.no_such_module")
    code, said = fail("lower", made[0], "-o", tmp_path / "bundle", "--target", "coreai", "--context", 256)
    assert code == 4 and "ended with exit code" in said and "No module named" in said
    assert not (tmp_path / "bundle").exists()


@needs_coreai
def test_bytes_are_the_same_wherever_they_are_made(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder, with another hash seed and in another time zone, by other processes."""
    for number, (seed, zone) in enumerate((("1", "Asia/Tokyo"), ("77", "America/Lima"))):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        monkeypatch.setenv("TZ", zone)
        place = tmp_path / f"folder {number}"
        lower(LowerRequest(made[0], OPTIONS), place)
        for path in sorted(find_asset(made[1]).iterdir()):
            assert path.read_bytes() == (find_asset(place) / path.name).read_bytes(), path.name
        for name in ("metadata.json", "design.json", "tokenizer/tokenizer.json"):
            assert (made[1] / name).read_bytes() == (place / name).read_bytes()


@pytest.mark.parametrize(
    ("system", "machine", "version", "told", "remedy"),
    [
        ("Windows", "AMD64", VERSION, "not built for Windows on AMD64", "--target coreml"),
        ("Linux", "aarch64", VERSION, "not built for Linux on aarch64", "--target coreml"),
        ("Linux", "x86_64", None, "coreai-core is not installed", "pip install 'anequant[coreai]'"),
        ("Linux", "x86_64", "1.0.0b2", f"coreai-core is 1.0.0b2, {VERSION} is needed", "pip install"),
        ("Darwin", "arm64", "1.0.0b4", f"coreai-core is 1.0.0b4, {VERSION} is needed", "pip install"),
    ],
)
def test_another_version_or_platform_is_refused(
    system: str,
    machine: str,
    version: str | None,
    told: str,
    remedy: str,
    tmp_path: Path,
    tiny_qwen2: Path,
    quantize_model: Callable[..., Quantized],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = quantize_model(tiny_qwen2, "w4-nearest").folder
    real = importlib.metadata.version

    def found(name: str) -> str:
        if name != installed.PACKAGE:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(installed, "OLDEST_PYTHON", (3, 0))
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(importlib.metadata, "version", found)
    code, said = fail("lower", checkpoint, "-o", tmp_path / "bundle", "--target", "coreai")
    assert code == UnsupportedError.exit_code and told in said and remedy in said
    assert not list(tmp_path.iterdir())
    with pytest.raises(UnsupportedError, match=told.split(",", maxsplit=1)[0]):
        Runner(tmp_path / "x.aimodel")


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(installed, "OLDEST_PYTHON", (9, 9))
    problem = find_problem()
    assert problem is not None and "needs Python 3.11" in problem.what


@pytest.mark.parametrize(
    ("fed", "total", "expected"),
    [
        (0, 3, Window(0, 3, 8, 256)),
        (0, 64, Window(0, 64, 64, 256)),
        (0, 200, Window(0, 64, 64, 256)),
        (64, 200, Window(64, 64, 64, 256)),
        (63, 64, Window(56, 8, 8, 256)),
        (70, 71, Window(64, 7, 8, 256)),
        (100, 130, Window(64, 64, 64, 256)),
        (255, 256, Window(248, 8, 8, 256)),
        (256, 257, Window(256, 1, 8, 512)),
        (700, 701, Window(696, 5, 8, 1024)),
    ],
)
def test_windows_are_those_of_apples_host(fed: int, total: int, expected: Window) -> None:
    assert choose_window(DESIGN, fed, total) == expected


def test_every_position_is_computed_once_in_order() -> None:
    """However tokens arrive, windows end where the next ones begin, and stay inside of their context."""
    for steps in ([1] * 300, [7, 90, 3, 64, 65, 200], [500], [64, 64, 1, 1, 64]):
        fed = total = 0
        for count in steps:
            total += count
            while fed < total:
                window = choose_window(DESIGN, fed, total)
                assert window.start <= fed < window.start + window.count <= total
                assert window.start % window.length == 0
                assert window.start + window.length <= window.context
                fed = window.start + window.count


def test_masks_hide_what_lies_ahead() -> None:
    window = Window(8, 3, 8, 256)
    mask = make_mask(window, np.float16)
    assert mask.shape == (1, 256, 1, 8) and mask.dtype == np.float16
    for query in range(8):
        seen = np.flatnonzero(mask[0, :, 0, query] == 0).tolist()
        assert seen == (list(range(8 + query + 1)) if query < 3 else [])
    assert set(np.unique(mask)) == {np.float16(MASKED), np.float16(0)}
    functional = make_functional_mask(window, np.float32)
    assert functional.shape == (1, 264, 1, 8)
    for query in range(3):
        seen = np.flatnonzero(functional[0, :, 0, query] == 0).tolist()
        assert seen == [*range(8), *range(256, 256 + query + 1)]


def test_messages_hold_arrays() -> None:
    stream = io.BytesIO()
    arrays: dict[str, Any] = {
        "half": np.arange(6, dtype=np.float16).reshape(1, 2, 3)[:, ::-1],
        "scalar": np.array(3, np.uint16),
        "none": np.zeros((0, 4), np.int32),
    }
    send(stream, {"run": "f", "kept": {}}, arrays)
    send(stream, {"forget": True})
    stream.seek(0)
    content, found = receive(stream)
    assert content == {"run": "f", "kept": {}} and found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
    assert receive(stream) == ({"forget": True}, {})
    with pytest.raises(EOFError):
        receive(stream)


def test_a_bundle_names_an_asset_inside_of_it(tmp_path: Path) -> None:
    from anequant.errors import InputError

    for name in ("../x.aimodel", "/x.aimodel", "x.mlpackage", 3, None, "missing.aimodel"):
        (tmp_path / "metadata.json").write_text(json.dumps({"assets": {"main": name}}), encoding="utf-8")
        with pytest.raises(InputError, match="asset"):
            find_asset(tmp_path)
    assert BUNDLE_KIND == "bundle" and runner.LONGEST > 0
