"""Where outputs may go and what sources may be: refused before anything is written, by path."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import assert_refused, fingerprint
from running import SCRIPT, execute, invoke, succeed
from safetensors import safe_open

from anequant.checkpoints import reader
from anequant.checkpoints.writer import CheckpointWriter
from anequant.errors import InputError, ResourceError, UsageError

pytestmark = pytest.mark.usefixtures("warm")

BAD, USAGE = InputError.exit_code, UsageError.exit_code
SHARD = "model.safetensors"
Place = Callable[[Path], Path]


def link(place: Path, target: str) -> Path:
    (place / "out").symlink_to(target)
    return place / "out"


def file(place: Path) -> Path:
    (place / "out").write_text("mine")
    return place / "out"


def folder(place: Path, content: str | None) -> Path:
    (place / "out").mkdir()
    if content is not None:
        (place / "out" / content).write_text("mine")
    return place / "out"


def pipe(place: Path) -> Path:
    os.mkfifo(place / "out")
    return place / "out"


OUTPUTS: dict[str, tuple[Place, tuple[str, ...]]] = {
    "a file": (file, ("exists",)),
    "an empty folder": (lambda place: folder(place, None), ("exists",)),
    "a folder that holds something": (lambda place: folder(place, "thesis.txt"), ("exists",)),
    "a link to nothing": (lambda place: link(place, "gone"), ("exists",)),
    "a link to the source": (lambda place: link(place, "model"), ("exists",)),
    "a link to itself": (lambda place: link(place, "out"), ("out",)),
    "a pipe": (pipe, ("exists",)),
    "the source": (lambda place: place / "model", ("exists",)),
    "inside the source": (lambda place: place / "model" / "out", ("overlaps", "write beside")),
    "inside the source by a detour": (lambda place: place / "model" / "." / "out", ("overlaps",)),
    "under a file": (lambda place: place / "model" / "config.json" / "out", ("under", "no folder")),
    "too long": (lambda place: place / ("a" * 300), ("cannot be created", "too long")),
    "bytes that are no text": (lambda place: place / "a\udcff", ("is not UTF-8",)),
    "no name": (lambda place: Path(""), ("exists",)),
    "the root": (lambda place: Path("/"), ("exists",)),
    "a place without a folder": (lambda place: Path("/proc/out"), ("cannot be created",)),
}

FORCED = ("a file", "a link to nothing", "a link to the source", "a pipe", "the source", "inside the source")
"""What --force does not replace either."""


def arguments(model: Path, output: Path, *more: str) -> list[Any]:
    return ["quantize", model, "-o", output, "--recipe", "w4-nearest", *more]


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_cannot_be_is_refused(model: Path, case: str) -> None:
    make, words = OUTPUTS[case]
    output = make(model.parent)
    assert_refused(model.parent, arguments(model, output), USAGE, *words, planned=False)


@pytest.mark.parametrize("case", FORCED)
def test_force_replaces_folders_only(model: Path, case: str) -> None:
    output = OUTPUTS[case][0](model.parent)
    assert_refused(model.parent, arguments(model, output, "--force"), USAGE, "output", planned=False)


@pytest.mark.parametrize(
    "name", ["a b", "it's", '"q"', "$(touch x)", "a\nb", "Ünï-文", "~", "-o", "a;b", "x/"]
)
def test_any_other_name_is_a_name(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    before = fingerprint(model)
    output = model.parent / "made" / name
    for words in (arguments(model, output, "--quiet"), ["verify", output, "--quiet"]):
        succeed(*words)
    made = {path.name for path in (model.parent / "made").iterdir()}
    assert made == {name.rstrip("/")} and not (model.parent / "x").exists()
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["a$HOME", "x ~: #'\"\n%41 {", "~nobody-there", "-文"])
def test_any_name_of_a_checkpoint_and_its_packages(
    tmp_path: Path, make_model: Callable[..., Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """coremltools expands variables in a path, and YAML gives a meaning to most marks."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
    source = make_model(tmp_path / "made" / name / name, "qwen2", False, **sizes)
    checkpoint, packages = source.with_name(f"{name}.c"), source.with_name(f"{name}.p")
    for words in (
        arguments(source, checkpoint, "--quiet"),
        ["lower", checkpoint, "-o", packages, "--context", "16", "--batch", "8", "--quiet"],
        ["verify", packages, "--checkpoint", checkpoint, "--quiet"],
        ["lint", packages, "--quiet"],
        ["inspect", packages, "--quiet"],
        ["diff", packages, packages, "--quiet"],
        ["report", checkpoint, "--base", source, "--quiet"],
        ["push", checkpoint, "org/name", "--quiet"],
        ["rotate", source, "-o", source.with_name(f"{name}.r"), "--quiet"],
    ):
        result = invoke(*words)
        assert result.exit_code == 0, (words[0], result.stderr)
    assert {path.name for path in source.parent.iterdir()} == {name, *(f"{name}.{end}" for end in "cpr")}
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


def test_a_source_that_may_not_be_written_to(model: Path) -> None:
    for path in (*model.iterdir(), model):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = fingerprint(model)
    words = arguments(model, model.parent / "out", "--quiet")
    result = invoke(*words)
    model.chmod(0o755)
    assert result.exit_code == 0, result.stderr
    assert fingerprint(model) == before
    assert os.access(model.parent / "out" / SHARD, os.W_OK)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def ring(path: Path) -> None:
    path.symlink_to("b.json")
    (path.parent / "b.json").symlink_to(path.name)


@pytest.mark.parametrize("make", [os.mkfifo, device, ring, os.mkdir])
@pytest.mark.parametrize("name", ["config.json", SHARD, "model.safetensors.index.json"])
def test_a_file_that_is_none_does_not_hang(model: Path, make: Callable[[Path], None], name: str) -> None:
    if (model / name).exists():
        (model / name).unlink()
    elif make is not ring:
        shutil.move(model / SHARD, model / "model-00001-of-00001.safetensors")
    else:
        pytest.skip("a link that leads nowhere is no index, and the single file is read")
    make(model / name)
    words = ("holds no safetensors weights",) if "safetensors" in name else ("'config.json'",)
    assert_refused(model.parent, arguments(model, model.parent / "out"), BAD, *words)


@pytest.mark.parametrize("name", ["m" * 300, "a\0b", "~nobody-there/x", "model/config.json", "\x1b[2J"])
def test_a_model_that_is_no_folder(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert_refused(model.parent, ["quantize", name, "-o", "out"], BAD, "model")


def test_an_unreadable_file_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is played."""
    original = Path.read_text

    def read_text(path: Path, *words: Any, **options: Any) -> str:
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *words, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    words = ("'config.json' cannot be read", "Permission denied")
    assert_refused(model.parent, arguments(model, model.parent / "out"), BAD, *words)


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md"])
def test_a_side_file_that_cannot_be_opened_is_named_first(
    model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / name).write_text("{}")
    original = Path.open

    def denied(path: Path, *words: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        result = invoke(*arguments(model, model.parent / "out"))
    assert result.exit_code == BAD, result.stderr
    for word in (f"'{name}' cannot be read", "Permission denied", "check its permissions", str(model)):
        assert word in result.stderr
    assert [path.name for path in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("content", ['{"eos_token_id": [', "[]", "\xff"])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_broken_side_file_is_named_first(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content, encoding="latin-1")
    assert_refused(model.parent, arguments(model, model.parent / "out"), BAD, f"'{name}'", str(model))


@pytest.mark.parametrize("kind", ["EFBIG", "EACCES", "EROFS", "ENAMETOOLONG", "EMFILE"])
def test_what_the_system_refuses_is_named(model: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What, where and what to do, of an error that names no file."""
    number = getattr(errno, kind)

    def write(*words: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(CheckpointWriter, "write", write)
    words = (f"out' cannot be written: {os.strerror(number)}", "  where: ", ".out.partial", "  do: ")
    assert_refused(
        model.parent, arguments(model, model.parent / "out"), ResourceError.exit_code, *words, planned=False
    )


def test_a_limit_on_file_sizes(model: Path) -> None:
    """The system's own error, in a process of its own."""
    words = [str(word) for word in (SCRIPT, *arguments(model, model.parent / "out", "--quiet"))]
    before = fingerprint(model.parent)
    ran = execute("bash", "-c", f"ulimit -f 100; {shlex.join(words)}")
    assert ran.exit_code == ResourceError.exit_code, ran.stderr
    assert "File too large" in ran.stderr and "ulimit -f" in ran.stderr and "out" in ran.stderr
    assert fingerprint(model.parent) == before


@pytest.mark.parametrize("left", [None, 1000])
def test_a_shard_that_vanishes_or_shrinks_while_it_is_read(
    model: Path, left: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = reader.Checkpoint.read, []

    def read(checkpoint: Any, name: str, *words: Any) -> Any:
        seen.append(name)
        if len(seen) == 12:
            if left is None:
                (model / SHARD).unlink()
            else:
                os.truncate(model / SHARD, left)
        return original(checkpoint, name, *words)

    monkeypatch.setattr(reader.Checkpoint, "read", read)
    result = invoke(*arguments(model, model.parent / "out"))
    assert result.exit_code == BAD, result.stderr
    assert "'model." in result.stderr and SHARD in result.stderr and "Traceback" not in result.stderr
    assert {path.name for path in model.parent.iterdir()} == {"model"}


def test_a_hub_cache_of_links_is_read(model: Path) -> None:
    """Containment is by name: the cache's files lie elsewhere."""
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    words = arguments(model, model.parent / "out", "--quiet")
    succeed(*words)
    with safe_open(model.parent / "out" / SHARD, framework="np") as tensors:
        assert tensors.get_tensor("lm_head.weight").shape == (97, 64)


def test_lowering_refuses_what_quantizing_refuses(model: Path) -> None:
    words = ["lower", model, "-o", model / "out"]
    result = invoke(*words)
    assert result.exit_code in (USAGE, BAD, ResourceError.exit_code)
    assert not (model / "out").exists()
