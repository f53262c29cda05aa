"""Code that a checkpoint brings along: looked for, told, and never imported."""

from __future__ import annotations

from pathlib import Path

from anequant.checkpoints.reader import read_object
from anequant.errors import InputError

KEYS = ("auto_map", "custom_pipelines", "custom_generate", "model_file")
FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def custom_code(folder: Path) -> tuple[str, ...]:
    """What in a model folder asks for code to be run: Python files, and keys of JSON files that name some.

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
