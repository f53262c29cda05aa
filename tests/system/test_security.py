"""What SECURITY.md promises: no code of a checkpoint, no pickle, no network unless asked, no escapes."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import pickle
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
from hub import HTTP, played
from running import invoke, succeed
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import anequant
from anequant.cli.console import Console
from anequant.errors import InputError, VerificationError

COMMIT = "c0ffee" + "0123456789" * 3 + "abcd"
WORDS = [f"w{number}" for number in range(90)]
EVIL = "\x1b]0;owned\x07\x9b31m\u202e"
"""A title, a colour and a change of direction, as a terminal would take them."""


@dataclass
class Guard(importlib.abc.MetaPathFinder):
    """Refuses to import what a checkpoint brings along, and remembers that it was asked."""

    asked: list[str] = field(default_factory=list)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in (
            "modeling_x",
            "tokenization_x",
            "configuration_x",
            "transformers_modules",
        ):
            self.asked.append(name)
            raise ImportError(f"{name} is a checkpoint's")
        return None


class Bomb:
    """Unpickled, it touches a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.sentinel,))


def forbidden(what: str) -> Callable[..., NoReturn]:
    def refuse(*words: Any, **options: Any) -> NoReturn:
        raise AssertionError(f"{what} was used")

    return refuse


@pytest.fixture
def hostile(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A sound model that asks for its code to be run, in every way that there is."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
    model = make_model(tmp_path / "model", "qwen2", False, **sizes)
    sentinel = tmp_path / "sentinel"
    code = f"from pathlib import Path\nPath({str(sentinel)!r}).touch()\nclass X: pass\nXTokenizer = X\n"
    for name in ("modeling_x", "tokenization_x", "configuration_x", "__init__", "sitecustomize"):
        (model / f"{name}.py").write_text(code)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Bomb(sentinel)))
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    remote = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    edit(
        model / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<s>",
        auto_map=remote,
    )
    maps = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    edit(
        model / "config.json",
        auto_map=maps,
        architectures=["X"],
        custom_pipelines={"x": {"impl": "modeling_x.X"}},
    )
    edit(model / "generation_config.json", custom_generate="org/evil")
    return model


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**values, **changes}))


def run(*words: object) -> str:
    result = succeed(*words)
    return result.stdout + result.stderr


def test_nothing_runs_nothing_is_unpickled_and_nobody_is_called(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 8))
    calibration = ("--calib", text, "--calib-samples", 4, "--calib-length", 16)
    run("quantize", hostile, "-o", tmp_path / "first", *calibration)  # numba unpickles loops of its own cache

    guard = Guard()
    monkeypatch.setattr(sys, "meta_path", [guard, *sys.meta_path])
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, forbidden("the network"))
    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden("pickle"))
    monkeypatch.setattr(torch, "load", forbidden("torch.load"))

    checkpoint, packages = tmp_path / "checkpoint", tmp_path / "packages"
    said = run("quantize", hostile, "-o", checkpoint, *calibration)
    assert "ignored, no code of a checkpoint is run" in said
    for word in (
        "modeling_x.py",
        "auto_map in config.json",
        "auto_map in tokenizer_config.json",
        "custom_generate",
    ):
        assert word in said, said
    run("lower", checkpoint, "-o", packages, "--context", 16, "--batch", 8)
    run("verify", checkpoint)
    run("verify", packages, "--checkpoint", checkpoint)
    for model in (checkpoint, hostile):
        run("eval", model, "--text", text, "--length", 16, "--windows", 2)
        assert type(anequant.load(model)).__module__.startswith("transformers.models.qwen2")
    run("generate", packages, "--prompt", "w1 w2", "--max-tokens", 2)
    run("generate", checkpoint, "--prompt", "w1 w2", "--max-tokens", 2, "--backend", "transformers")

    assert guard.asked == [] and not (tmp_path / "sentinel").exists()
    ignored = json.loads((checkpoint / "anequant.json").read_text())["source"]["ignored"]
    assert "custom_pipelines in config.json" in ignored
    written = {path.name for folder in (checkpoint, packages) for path in folder.rglob("*")}
    assert not {name for name in written if name.endswith((".py", ".bin", ".pt"))} - {"weight.bin"}
    assert "auto_map" not in json.loads((checkpoint / "config.json").read_text())


def test_a_tokenizer_that_is_nothing_but_code_is_refused(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard()
    monkeypatch.setattr(sys, "meta_path", [guard, *sys.meta_path])
    (hostile / "tokenizer.json").write_text("")
    edit(hostile / "tokenizer_config.json", tokenizer_class="XTokenizer")
    (tmp_path / "text.txt").write_text("w1 w2")
    words = ["quantize", str(hostile), "-o", str(tmp_path / "out"), "--calib", str(tmp_path / "text.txt")]
    result = invoke(*words)
    assert result.exit_code == InputError.exit_code and "the tokenizer of" in result.stderr
    assert guard.asked == [] and not (tmp_path / "sentinel").exists()


def test_only_pickles_are_no_model(hostile: Path, tmp_path: Path) -> None:
    (hostile / "model.safetensors").unlink()
    result = invoke("quantize", hostile, "-o", tmp_path / "out")
    assert result.exit_code == InputError.exit_code and "pytorch_model.bin" in result.stderr
    assert not (tmp_path / "sentinel").exists() and not (tmp_path / "out").exists()


def test_the_hub_is_asked_for_one_commit_and_the_commit_is_recorded(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a transport that is played: which files are asked for, and at which revision."""
    files = {path.name: path.read_bytes() for path in hostile.iterdir()}
    asked: list[tuple[str, str, str]] = []

    def answer(request: Any) -> Any:
        path = request.url.path
        if path.startswith("/api/models/org/m/revision/"):
            asked.append(("list", path.rsplit("/", 1)[1], ""))
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            return HTTP.Response(200, json={"id": "org/m", "sha": COMMIT, "siblings": siblings})
        if path.startswith("/api/models/org/m/tree/"):
            asked.append(("tree", path.rsplit("/", 1)[1], ""))
            listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
            return HTTP.Response(200, json=listed)
        if path.startswith("/org/m/resolve/"):
            revision, name = path.removeprefix("/org/m/resolve/").split("/", 1)
            asked.append((request.method, revision, name))
            headers = {"x-repo-commit": COMMIT, "etag": f'"{len(files[name])}-{name}"'}
            body = files[name]
            if request.method == "HEAD":
                return HTTP.Response(200, headers={**headers, "content-length": str(len(body))})
            return HTTP.Response(200, headers=headers, content=body)
        return HTTP.Response(404, json={})

    monkeypatch.setattr(socket, "create_connection", forbidden("the network"))
    with played(answer, tmp_path / "cache"):
        run("quantize", "org/m@v1.0", "-o", tmp_path / "out", "--recipe", "w4-nearest")
    listed = [revision for method, revision, _ in asked if method == "list"]
    fetched = {(revision, name) for method, revision, name in asked if method != "list"}
    assert listed == ["v1.0"]
    assert {revision for revision, _ in fetched} == {COMMIT}
    names = {name for _, name in fetched}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".py", ".bin", ".pt"))}
    source = json.loads((tmp_path / "out" / "anequant.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("m", COMMIT)


@pytest.mark.parametrize("as_json", [True, False])
def test_nothing_that_is_told_acts_on_a_terminal(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    console = Console(json=as_json)
    console.result({EVIL: [EVIL], "lone": "\udc80"}, [(f"name{EVIL}", EVIL), ("lone", "\udc80")])
    console.note(EVIL)
    console.error(VerificationError(EVIL, where=EVIL, remedy=EVIL))
    shown = capsys.readouterr()
    for stream in (shown.out, shown.err):
        assert stream and stream.replace("\n", "").isprintable(), repr(stream)
    if as_json:
        result, error = shown.out.splitlines()
        assert json.loads(result) == {EVIL: [EVIL], "lone": "\udc80"}
        assert json.loads(error)["error"]["what"] == EVIL


def test_progress_shows_names_without_escapes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anequant.cli.console.SHOW_AFTER", 0.0)
    with Console().progress("quantize") as progress:
        progress(EVIL, 0.5)
    shown = capsys.readouterr().err
    assert "owned" in shown and shown.replace("\n", "").isprintable(), repr(shown)


def test_a_running_text_is_what_the_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    """By design: chat and generate print a model's words as they are."""
    Console().text(EVIL)
    assert capsys.readouterr().out == EVIL


@pytest.mark.parametrize("as_json", [True, False])
def test_a_folder_with_a_hostile_name(hostile: Path, tmp_path: Path, as_json: bool) -> None:
    model = hostile.rename(tmp_path / "a\x1b[2Jb")
    words = ["quantize", str(model), "-o", str(tmp_path / "out\x1b[2J"), "--recipe", "w4-nearest"]
    result = succeed(*words, *(["--json"] if as_json else []))
    for stream in (result.stdout, result.stderr):
        assert stream.replace("\n", "").isprintable(), repr(stream)
