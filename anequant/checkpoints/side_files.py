"""The files beside a checkpoint's weights: whether they can be read, what they ask to be run, and taking the
tokenizer along."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from anequant.checkpoints.license import CARD, LICENSE_FILES
from anequant.checkpoints.reader import read_object
from anequant.checkpoints.source import TOKENIZER_FILES
from anequant.errors import InputError

OBJECTS = ("generation_config.json", "tokenizer_config.json")
"""The files that are read here; the others are transformers' to read."""


def check_side_files(folder: Path) -> None:
    """Raises InputError naming the first file that is no regular one or cannot be opened, or of which JSON is
    expected and not found."""
    for name in (*TOKENIZER_FILES, CARD, *LICENSE_FILES):
        path = folder / name
        if not os.path.exists(path):
            continue
        if not path.is_file():
            raise InputError(f"'{name}' is not a regular file", where=str(folder), remedy="replace it")
        try:
            path.open("rb").close()
        except OSError as error:
            what = f"'{name}' cannot be read: {error.strerror}"
            raise InputError(what, where=str(folder), remedy="check its permissions") from error
        if name in OBJECTS:
            read_object(path)


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


KEYS = ("auto_map", "custom_pipelines", "custom_generate", "model_file")
FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def find_custom_code(folder: Path) -> tuple[str, ...]:
    """Return what in a model folder asks for code to be run: Python files, and keys of JSON that name some.

    Files that cannot be read name nothing.
    """
    found = sorted(path.name for path in folder.glob("*.py"))
    for name in FILES:
        try:
            values = read_object(folder / name)
        except InputError:
            continue
        found += [f"{key} in {name}" for key in KEYS if values.get(key)]
    return tuple(found)
