"""Tasks and results as files of safetensors, so that no large tensor goes through a cluster's messages.

A file holds the tensors of one value, and in its metadata the value itself as JSON in which each object is a
kind and what is needed to make it again. Only dataclasses of anequant are made, and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

VALUE = "value"
PACKAGE = "anequant"


def write_value(path: Path, value: object) -> None:
    """Write a value to `path`, which is there when it is whole.

    Raises TypeError for what is none of None, bool, int, float, str, Path, range, Tensor, tuple, list, dict
    and dataclass of anequant, or a tensor that leaves out elements of its memory.
    """
    tensors: dict[str, Tensor] = {}
    tree = _describe(value, tensors)
    scratch = path.with_name(f"{path.name}.part")
    save_file(tensors, scratch, metadata={VALUE: json.dumps(tree)})
    scratch.rename(path)


def read_value(path: Path) -> Any:
    """Return what `write_value` wrote: the same numbers, and tensors with the same order of dimensions in
    memory, on which the order of sums depends."""
    with safe_open(path, framework="pt") as file:
        return _make(json.loads(file.metadata()[VALUE]), file)


def paths_in(value: object) -> Iterator[Path]:
    """Every path in a value."""
    if isinstance(value, Path):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from paths_in(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from paths_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from paths_in(item)


def _describe(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the value as JSON; its tensors are put into `tensors`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return _describe_tensor(value, tensors)
    if isinstance(value, Path):
        return {"path": str(value.absolute())}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_describe(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_describe(part, tensors) for part in pair] for pair in value.items()]}
    kind = type(value)
    if dataclasses.is_dataclass(kind) and kind.__module__.partition(".")[0] == PACKAGE:
        values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        fields = {name: _describe(item, tensors) for name, item in values.items()}
        return {"type": f"{kind.__module__}:{kind.__qualname__}", "fields": fields}
    raise TypeError(f"a task cannot hold a {kind.__module__}.{kind.__qualname__}")


def _describe_tensor(tensor: Tensor, tensors: dict[str, Tensor]) -> Any:
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    stored = tensor.detach().permute(order)
    if not stored.is_contiguous():
        raise TypeError(f"a task cannot hold a part of a tensor: {tuple(tensor.shape)} {tensor.stride()}")
    if any(_shares_memory(stored, other) for other in tensors.values()):
        stored = stored.clone()
    name = str(len(tensors))
    tensors[name] = stored
    return {"tensor": name, "order": order}


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _make(tree: Any, file: Any) -> Any:
    """Return the value that `_describe` describes."""
    if not isinstance(tree, dict):
        return tree
    if "type" in tree:
        fields = {name: _make(item, file) for name, item in tree["fields"].items()}
        return _find_dataclass(tree["type"])(**fields)
    if "tensor" in tree:
        stored: Tensor = file.get_tensor(tree["tensor"]).clone()  # aligned as any other tensor is
        order = tree["order"]
        return stored.permute([order.index(dimension) for dimension in range(len(order))])
    (kind, content), *_ = tree.items()
    if kind == "path":
        return Path(content)
    if kind == "range":
        return range(*content)
    if kind == "dict":
        return {_make(key, file): _make(item, file) for key, item in content}
    items = [_make(item, file) for item in content]
    return tuple(items) if kind == "tuple" else items


def _find_dataclass(name: str) -> Any:
    module, _, qualified = name.partition(":")
    found: Any = None
    if module.partition(".")[0] == PACKAGE:
        found = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise TypeError(f"'{name}' is no dataclass of {PACKAGE}")
    return found


@contextmanager
def passing_folder(home: Path) -> Iterator[Path]:
    """A new folder in `home` that is gone in the end, also for whoever still wants to write there."""
    folder = home / uuid4().hex
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        gone = folder.rename(folder.with_name(f"{folder.name}.gone"))
        shutil.rmtree(gone, ignore_errors=True)
