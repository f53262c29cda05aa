"""Files that tests compare and change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

Contents = dict[str, bytes | None]
Tensors = dict[str, Tensor]


def contents(folder: Path) -> Contents:
    """The bytes of every file below a folder, by relative path; None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def differing(one: Contents, other: Contents) -> list[str]:
    """The files and folders that are not in both with the same bytes."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name, b"-") != other.get(name, b"-"))


def edit_json(file: Path, **changes: Any) -> None:
    """Give the object in a file other values for these keys."""
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> Tensors:
    """Change the tensors of a model in one file; they are returned as they are then."""
    shard = folder / "model.safetensors"
    tensors: Tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return tensors
