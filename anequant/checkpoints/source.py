"""Where a model comes from: a folder, or a hub id with an optional `@revision`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from anequant.checkpoints.license import CARD, LICENSE_FILES
from anequant.errors import InputError, first_line, quote

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
DOWNLOADED = (
    *("config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES),
    *(CARD, *LICENSE_FILES),
)
BUNDLED_MODEL = Path(__file__).parent.parent / "bundled" / "tiny-qwen2"
SAMPLE_TEXT = Path(__file__).parent.parent / "bundled" / "sample.txt"
OPENINGS = Path(__file__).parent.parent / "bundled" / "openings.jsonl"
"""Beginnings of texts of many kinds, a string a line."""

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


@dataclass(frozen=True)
class Source:
    """A model folder on this machine; `revision` is the hub commit it was downloaded from, `repo` the hub's
    name of it, or None."""

    folder: Path
    name: str
    revision: str | None = None
    repo: str | None = None


def resolve_source(model: str | None) -> Source:
    """Return the folder of MODEL; None is the bundled model. An existing folder wins over a hub id.

    Raises InputError when there is no such folder and the hub has, or can be asked for, no such model.
    """
    return find_local_source(model) or _download(*parse_hub_id(str(model)))


def find_local_source(model: str | None) -> Source | None:
    """Return the folder of MODEL, None where it is no path; raises InputError for a path to anything else."""
    if model is None:
        return Source(BUNDLED_MODEL, BUNDLED_MODEL.name)
    try:
        folder = Path(os.path.expanduser(model))
        if folder.is_dir():
            return Source(folder, _as_text(folder.resolve().name))
        there = folder.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"model {quote(model)} cannot be opened: {error}") from error
    if there:
        raise InputError(f"'{model}' is a file, not a model folder", remedy="name the folder it is in")
    return None


def _as_text(name: str) -> str:
    """Return the name of a file without bytes that are no UTF-8, which no text file holds."""
    return name.encode(errors="replace").decode()


def parse_hub_id(model: str) -> tuple[str, str | None]:
    """Return the repository and the revision, if one is named; raises InputError for what is no hub id."""
    match = _HUB_ID.fullmatch(model)
    if match is None or model.startswith("."):
        raise InputError(
            f"model folder '{model}' does not exist", remedy="name a folder, or a hub id such as org/name"
        )
    return match["repo"], match["revision"]


def _download(repo: str, revision: str | None) -> Source:
    """Return the hub's snapshot in the local cache; its folder is named after the commit, also when
    offline."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=list(DOWNLOADED))
    except (hub.HTTPError, hub.HFValidationError, OSError) as error:  # type: ignore[attr-defined]
        reason = first_line(error)
        raise InputError(
            f"'{repo}' is no folder here and could not be had from the hub: {reason}",
            remedy="check the name, the revision and the network, or download it and name the folder",
        ) from error
    return Source(Path(folder), repo.split("/")[1], Path(folder).name, repo)
