"""A hub model opened by its config and headers, against a hub that is a folder and counts what it serves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub import HTTP, played

from anequant.checkpoints.header import read_header
from anequant.checkpoints.hub_headers import fetch_headers
from anequant.checkpoints.reader import open_checkpoint
from anequant.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FILE = re.compile(rf"/org/model/resolve/{COMMIT}/(?P<name>.+)")


class Hub:
    """Serves the files of a folder as org/model; `bodies` are the bytes sent of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bodies: dict[str, int] = {}

    def __call__(self, request: Any) -> Any:
        if request.url.path.startswith("/api/models/org/model"):
            siblings = [{"rfilename": path.name} for path in sorted(self.folder.iterdir())]
            return HTTP.Response(200, json={"id": "org/model", "sha": COMMIT, "siblings": siblings})
        match = _FILE.fullmatch(request.url.path)
        if match is None or not (self.folder / match["name"]).is_file():
            return HTTP.Response(404, headers={"X-Error-Code": "EntryNotFound"}, request=request)
        content = (self.folder / match["name"]).read_bytes()
        headers = {"ETag": '"etag"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
        if request.method == "HEAD":
            return HTTP.Response(200, headers=headers, request=request)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)?", request.headers.get("range", ""))
        if wanted is not None:
            content = content[int(wanted[1]) : int(wanted[2] or len(content)) + 1]
        self.bodies[match["name"]] = self.bodies.get(match["name"], 0) + len(content)
        return HTTP.Response(206 if wanted else 200, content=content, headers={"ETag": '"etag"'})


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Path], Hub]]:
    """`serve(folder)`: that folder is the hub's only model, and nothing of it was cached before."""
    with ExitStack() as playing:

        def start(folder: Path) -> Hub:
            hub = Hub(folder)
            playing.enter_context(played(hub, tmp_path / "hub"))
            return hub

        yield start


@pytest.mark.parametrize("shards", ["5GB", "200KB"])
def test_headers_from_the_hub_open_as_the_folder_does_and_no_weights_are_fetched(
    serve: Callable[[Path], Hub], make_model: Callable[..., Path], tmp_path: Path, shards: str
) -> None:
    folder = make_model(tmp_path / "model", "llama", False, max_shard_size=shards, vocab_size=8192)
    (folder / "tokenizer.json").write_text("{}")
    hub = serve(folder)
    with fetch_headers(f"org/model@{COMMIT}") as source:
        opened, expected = open_checkpoint(source.folder), open_checkpoint(folder)
        assert {path.name for path in opened.shards} == {path.name for path in expected.shards}
        for name, info in expected.tensors.items():
            assert replace(opened.tensors[name], shard=info.shard, start=info.start) == info
        assert opened.spec == expected.spec
        assert (source.name, source.revision, source.repo) == ("model", COMMIT, "org/model")
        assert (source.folder / "tokenizer.json").read_text() == "{}"
    assert not source.folder.exists()
    served = {name: count for name, count in hub.bodies.items() if name.endswith(".safetensors")}
    assert served.keys() == {path.name for path in expected.shards}
    assert max(served.values()) <= 100_001
    assert hub.bodies["tokenizer.json"] == 2


def test_a_folder_is_taken_as_it_is(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", False)
    with fetch_headers(str(folder)) as source:
        assert source.folder == folder


def test_what_is_not_on_the_hub_is_an_input_error(
    serve: Callable[[Path], Hub], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", "llama", False)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    serve(folder)
    for name in ("org/model", "org/gone"):
        with (
            pytest.raises(InputError, match=re.escape(f"'{name}' is no folder here")),
            fetch_headers(name),
        ):
            pytest.fail("it was let in")


@pytest.mark.parametrize("name", ["../model.safetensors", "inner/model.safetensors", "model.bin"])
def test_a_shard_with_an_impossible_name_is_refused(
    serve: Callable[[Path], Hub],
    make_model: Callable[..., Path],
    tmp_path: Path,
    name: str,
) -> None:
    folder = make_model(tmp_path / "model", "llama", False, max_shard_size="200KB", vocab_size=8192)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(values))
    serve(folder)
    with pytest.raises(InputError, match="impossible name"), fetch_headers("org/model"):
        pytest.fail("it was let in")


def test_a_header_whose_length_begins_as_a_pickle_does_is_a_header(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(0x0280)
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert file.read_bytes().startswith(b"\x80\x02")
    assert read_header(file)["a"].shape == (2,)
