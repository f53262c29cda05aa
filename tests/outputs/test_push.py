"""`anequant push`: what it tells, what it refuses, and what it hands to huggingface_hub, which is mocked."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError
from running import Ran, invoke, succeed

from anequant.checkpoints.source import BUNDLED_MODEL, Source
from anequant.pipeline.quantize import quantize
from anequant.recipe_files import load_recipe
from anequant.request import Request
from anequant.verification.verify import verify_checkpoint

USAGE, INPUT, RESOURCE, VERIFICATION = 2, 3, 5, 6


@dataclass
class Hub:
    """Stands in for HfApi: remembers what it is asked; `existing` is the visibility of a repository that is
    there already."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    existing: bool | None = None
    failure: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        if self.failure is not None:
            raise self.failure
        self.private = options["private"] if self.existing is None else self.existing
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{full}")

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "out"
    quantize(Request(Source(BUNDLED_MODEL, "tiny"), load_recipe("w4-nearest")), folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "out")


def push(*words: object) -> Ran:
    return invoke("push", *words)


def test_without_yes_nothing_is_sent(hub: Hub, folder: Path) -> None:
    result = push(folder, "org/tiny-w4")
    assert result.exit_code == 0, result.stderr
    assert hub.calls == []
    names = {path.name for path in folder.iterdir()}
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert f"would upload  {len(names)} files of a checkpoint, {size:,} bytes, to org/tiny-w4 (public)" in (
        result.stdout
    )
    assert all(name in result.stdout for name in names)
    assert "nothing was sent: add --yes" in result.stdout


def test_with_yes_exactly_the_output_is_sent(hub: Hub, folder: Path) -> None:
    result = push(folder, "org/tiny-w4", "--private", "--yes", "--json")
    assert result.exit_code == 0, result.stderr
    (create, asked), (upload, options) = hub.calls
    assert (create, asked) == (
        "create_repo",
        {"repo_id": "org/tiny-w4", "private": True, "exist_ok": True},
    )
    assert (upload, options["repo_id"], options["folder_path"]) == ("upload_folder", "org/tiny-w4", folder)
    assert set(options["allow_patterns"]) == {path.name for path in folder.iterdir()}
    assert "token" not in {**asked, **options}
    said = json.loads(result.stdout)
    assert said["url"] == "https://huggingface.co/org/tiny-w4" and said["private"] is True
    assert said["bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_a_name_without_an_organisation_is_ones_own(hub: Hub, folder: Path) -> None:
    result = push(folder, "tiny", "--yes", "--json")
    assert result.exit_code == 0, result.stderr
    assert hub.calls[1][1]["repo_id"] == "me/tiny"
    assert json.loads(result.stdout)["repo"] == "me/tiny"


@pytest.mark.parametrize(("private", "existing"), [((), True), (("--private",), False)])
def test_an_existing_repository_keeps_its_visibility(
    hub: Hub, folder: Path, private: tuple[str, ...], existing: bool
) -> None:
    """A model that was meant to be private does not end up in a public repository, nor the reverse."""
    hub.existing = existing
    result = push(folder, "org/tiny", "--yes", *private)
    assert result.exit_code == USAGE
    assert "exists on the hub" in result.stderr
    assert [name for name, _ in hub.calls] == ["create_repo"]


@pytest.mark.parametrize("yes", [(), ("--yes",)])
@pytest.mark.parametrize("name", ["model.safetensors", "README.md"])
def test_a_changed_file_is_noticed_before_anything_is_sent(
    hub: Hub, folder: Path, yes: tuple[str, ...], name: str
) -> None:
    with (folder / name).open("r+b") as file:
        file.seek(100)
        file.write(b"?")
    result = push(folder, "org/tiny", *yes)
    assert result.exit_code == VERIFICATION
    assert name in result.stderr and hub.calls == []


def test_an_extra_file_is_not_sent(hub: Hub, folder: Path) -> None:
    (folder / "secrets.txt").write_text("mine")
    result = push(folder, "org/tiny", "--yes")
    assert result.exit_code == VERIFICATION
    assert "secrets.txt" in result.stderr and hub.calls == []


def test_a_folder_of_another_program_is_refused(hub: Hub) -> None:
    result = push(BUNDLED_MODEL, "org/tiny", "--yes")
    assert result.exit_code == INPUT
    assert "anequant did not write it" in result.stderr and hub.calls == []


@pytest.mark.parametrize("repo", ["a/b/c", "org/na me", "-x/y", "org/"])
def test_an_impossible_name_is_refused(hub: Hub, folder: Path, repo: str) -> None:
    result = push("--yes", "--", folder, repo)
    assert result.exit_code == USAGE
    assert "is no name of a repository" in result.stderr and hub.calls == []


def test_without_a_login_it_says_so(hub: Hub, folder: Path) -> None:
    hub.failure = LocalTokenNotFoundError("Token is required, but no token found.")
    result = push(folder, "org/tiny", "--yes")
    assert result.exit_code == RESOURCE
    assert "no token found" in result.stderr and "hf auth login" in result.stderr


def test_offline_is_an_error_like_any_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real HfApi, which is told to stay off the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = push(folder, "org/tiny", "--yes")
    assert result.exit_code == RESOURCE
    assert "HF_HUB_OFFLINE" in result.stderr


def test_a_download_of_an_upload_verifies(folder: Path) -> None:
    """The hub adds .gitattributes, and `hf download --local-dir` its notes."""
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "download" / "config.json.metadata").write_text("x")
    verify_checkpoint(folder)
    assert push(folder, "org/tiny").exit_code == 0
    (folder / ".cache" / "other").write_text("x")
    assert push(folder, "org/tiny").exit_code == VERIFICATION


def test_packages_alone_have_no_card_and_it_says_so(hub: Hub, written: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    words = ["lower", str(written), "-o", str(packages), "--context", "32", "--batch", "8"]
    succeed(*words)
    result = push(packages, "org/packages")
    assert result.exit_code == 0, result.stderr
    assert "none: this folder has no README.md" in result.stdout
    assert "weights/weight.bin" in result.stdout
