"""A model on the hub without its weights: its small files, and the shards' headers by range requests.

What is fetched becomes a folder whose shards hold their header and nothing behind it (sparse files of the
full size), so that the readers of a real folder check and open it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anequant.checkpoints.online_config import INDEX_SUFFIX, STEM, SUFFIX
from anequant.checkpoints.reader import read_object
from anequant.checkpoints.source import (
    TOKENIZER_FILES,
    Source,
    find_local_source,
    parse_hub_id,
    resolve_source,
)
from anequant.errors import InputError, first_line

SINGLE, INDEX = f"{STEM}{SUFFIX}", f"{STEM}{INDEX_SUFFIX}"
_SHARD = re.compile(r"[\w.-]+\.safetensors")


@contextmanager
def fetch_headers(model: str | None) -> Iterator[Source]:
    """Resolve a source as `resolve_source` does, but download nothing of a hub id except config.json, what
    belongs to the tokenizer and the shards' headers, into a folder that is gone afterwards. Offline, the
    cache has to hold the model.

    Raises InputError as `resolve_source` does, and for a repository without safetensors.
    """
    from huggingface_hub import constants

    local = find_local_source(model)
    if local is not None or constants.HF_HUB_OFFLINE:
        yield local or resolve_source(model)
        return
    with tempfile.TemporaryDirectory(prefix="anequant-headers-") as folder:
        yield _fetch(Path(folder), *parse_hub_id(str(model)))


def _fetch(folder: Path, repo: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    api = HfApi()
    try:
        info = api.model_info(repo, revision=revision)
        present = {sibling.rfilename for sibling in info.siblings or ()}
        for name in ("config.json", *sorted(present & set(TOKENIZER_FILES))):
            api.hf_hub_download(repo, name, revision=info.sha, local_dir=folder)
        for name in _shards(api, repo, info.sha, folder, single=SINGLE in present):
            shard = api.parse_safetensors_file_metadata(repo, name, revision=info.sha)
            _write_header(folder / name, shard)
    except (
        hub.HTTPError,  # type: ignore[attr-defined]
        hub.HFValidationError,
        hub.SafetensorsParsingError,
        OSError,
    ) as error:
        reason = first_line(error)
        raise InputError(
            f"'{repo}' is no folder here and its headers could not be had from the hub: {reason}",
            remedy="check the name, the revision and the network, or download it and name the folder",
        ) from error
    return Source(folder, repo.split("/")[1], info.sha, repo)


def _shards(api: Any, repo: str, revision: str | None, folder: Path, *, single: bool) -> list[str]:
    """Return the names of the weights' files: the `single` one, else those of the index, which is then in
    `folder` and not in a cache below the user's home.

    Raises InputError for an index that names anything but safetensors files beside it.
    """
    if single:
        return [SINGLE]
    api.hf_hub_download(repo, INDEX, revision=revision, local_dir=folder)
    weight_map = read_object(folder / INDEX).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    for name in sorted(names):
        if _SHARD.fullmatch(name) is None:
            raise InputError(f"'{repo}' has a shard with the impossible name {name!r}")
    return sorted(names)


def _write_header(path: Path, shard: Any) -> None:
    """Write a safetensors file of this header, and a hole in the place of its tensors."""
    header = {
        name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
        for name, info in shard.tensors.items()
    }
    text = json.dumps(header).encode()
    end = max((info.data_offsets[1] for info in shard.tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
