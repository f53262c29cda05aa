"""A tiny sound model to damage byte by byte, and what must hold when a command is given it."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from running import Ran, invoke, succeed

from anequant.reference.windows import load_tokenizer

SECONDS, MEGABYTES = 1.0, 300
TRIES = 3
Damage = Callable[[Path], object]
"""Changes the file or the folder of that path."""


def parts(shard: Path) -> tuple[dict[str, Any], bytes]:
    """The header's entries and the bytes behind it."""
    content = shard.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.pop("__metadata__", None)
    return header, content[end:]


def write(shard: Path, entries: dict[str, Any], data: bytes) -> None:
    """These entries of a file with `data`, packed anew."""
    header, chunks, end = {}, [], 0
    for name, entry in entries.items():
        begin, stop = entry["data_offsets"]
        chunks.append(data[begin:stop])
        header[name] = {**entry, "data_offsets": [end, end + stop - begin]}
        end += stop - begin
    raw(shard, json.dumps(header).encode(), b"".join(chunks))


def raw(shard: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    size = len(header) if length is None else length
    shard.write_bytes(size.to_bytes(8, "little") + header + data)


def fingerprint(folder: Path) -> dict[str, str]:
    """The hash of every regular file below a folder, and the kind of everything else."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "link"
        if path.is_symlink()
        else "other"
        for path in sorted(folder.rglob("*"))
    }


JOBS = ("quantize", "convert")
NO_PLAN = ("--output", "-o")


def spend(arguments: list[Any]) -> tuple[Ran, float]:
    """What a command ends with, and the processor's seconds in all threads of this process: not only its own.

    A collection of garbage or a thread that an earlier test left is counted too, so one try proves nothing.
    """
    begun = time.process_time()
    result = invoke(*arguments)
    return result, time.process_time() - begun


def assert_refused(place: Path, arguments: list[Any], code: int, *words: str, planned: bool = True) -> None:
    """The command fails with this exit code and these words, fast and small, and leaves nothing behind.

    Where it is a job, `plan` says the same, unless the reason is not `planned`: a weight's value, the output.
    """
    before = fingerprint(place)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result, seconds = spend(arguments)
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1e3
    assert result.exit_code == code, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) <= 4
    assert result.stderr.replace("\n", "").isprintable(), repr(result.stderr)
    assert megabytes < MEGABYTES, megabytes
    assert fingerprint(place) == before
    assert any(taken < SECONDS for taken in chain([seconds], (spend(arguments)[1] for _ in range(1, TRIES))))
    if planned and arguments[0] in JOBS:
        at = next(place for place, word in enumerate(arguments) if word in NO_PLAN)
        words_of_plan = ["plan", *arguments[1:at], *arguments[at + 2 :]]
        plan = invoke(*words_of_plan)
        assert (plan.exit_code, plan.stderr) == (result.exit_code, result.stderr)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return make_model(tmp_path_factory.mktemp("sound") / "model", "qwen2", False, **sizes)


@pytest.fixture(scope="session")
def warm(sound: Path, tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported and compiled once counts for no case of `assert_refused`."""
    load_tokenizer(tiny_qwen2)
    output = tmp_path_factory.mktemp("warm") / "out"
    succeed("quantize", sound, "-o", output, "--recipe", "w4-nearest")


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """A copy of `sound`, in one file."""
    return Path(shutil.copytree(sound, tmp_path / "place" / "model"))


@pytest.fixture
def in_two(model: Path) -> Path:
    """A copy of `sound`, in two shards and an index."""
    tensors, data = parts(model / "model.safetensors")
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2])):
        shard = f"model-{number + 1:05d}-of-00002.safetensors"
        write(model / shard, {name: tensors[name] for name in some}, data)
        weight_map |= dict.fromkeys(some, shard)
    (model / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model
