"""The licence that a model comes with, as its own files say, and its carrying over to what is made of it.

A model card's front matter names it by the hub's keys (`license`, and for other than the known ones
`license_name` and `license_link`). What is read here was written by others: only short words are taken.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anequant.strict import parse_yaml, read_plain

CARD = "README.md"
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
KEYS = ("license", "license_name", "license_link")
LARGEST_CARD, LONGEST_WORD = 1_000_000, 300
FENCE = "---"


@dataclass(frozen=True)
class License:
    """`metadata` are the front matter's keys, empty for a licence that is not known; `said` tells a reader
    where it comes from."""

    metadata: Mapping[str, str]
    said: str


def read_license(folder: Path) -> License:
    """Return the licence of the model in a folder: its card's, or else the file that lies beside the
    weights."""
    try:
        metadata = _front_matter(folder / CARD)
    except (OSError, ValueError) as error:
        metadata, problem = {}, f"its {CARD} cannot be read ({_one_line(error)})"
    else:
        problem = f"its {CARD} names none" if (folder / CARD).is_file() else f"it has no {CARD}"
    if "license" in metadata:
        return License(metadata, f"`{metadata['license']}`, as the base model's card says.")
    files = find_license_files(folder)
    if files:
        named = {"license": "other", "license_name": "as-the-base-model", "license_link": files[0]}
        return License(named, f"that of the base model, in `{files[0]}`.")
    return License(
        {}, f"not told by the base model's files: {problem}, and there is no LICENSE. Ask its makers."
    )


def find_license_files(folder: Path) -> list[str]:
    """Return the files of LICENSE_FILES that a folder holds."""
    return [name for name in LICENSE_FILES if (folder / name).is_file()]


def copy_license(source: Path, folder: Path) -> None:
    for name in find_license_files(source):
        shutil.copyfile(source / name, folder / name)


def _front_matter(card: Path) -> dict[str, str]:
    """Return the card's KEYS that are short words; raises OSError, and ValueError for YAML that cannot be
    read."""
    if not card.is_file():
        return {}
    first, *lines = read_plain(card, LARGEST_CARD).splitlines() or [""]
    if first.strip() != FENCE or FENCE not in lines:
        return {}
    values = parse_yaml("\n".join(lines[: lines.index(FENCE)]))
    found = values if isinstance(values, dict) else {}
    return {key: found[key] for key in KEYS if _is_word(found.get(key))}


def _is_word(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_WORD and value.isprintable()


def _one_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = text.splitlines()[0] if text else type(error).__name__
    return "".join(char if char.isprintable() else "?" for char in line)
