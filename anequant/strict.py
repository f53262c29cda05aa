"""JSON, TOML and YAML that others wrote, read strictly.

No key twice, no NaN where JSON has none, no tags and no aliases in YAML (an alias of aliases grows without
end when it is printed), no depth that exhausts the stack. Every parser raises ValueError and nothing else.
"""

from __future__ import annotations

import json
import re
import stat
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from anequant.errors import quote

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON writes half of a pair that stands for one character."""

DEEPEST_YAML = 50
"""PyYAML's time grows with the square of the depth, long before the stack ends."""


def read_plain(path: Path, largest: int | None = None) -> str:
    """Read a regular file, UTF-8 with or without a mark of it; a pipe or a device is not opened.

    Raises OSError, and ValueError for anything else than a file, for more than `largest` bytes, and for
    another encoding.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if largest is not None and status.st_size > largest:
        raise ValueError(f"it has more than {largest} bytes")
    return path.read_text(encoding="utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON without NaN, without infinities, without a key twice and without what is no Unicode."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_not_finite)
        if _HALF.search(text if isinstance(text, str) else text.decode("utf-8", "replace")):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text in it holds half a character") from error
    return value


def parse_toml(text: str) -> Any:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """Parse the safe part of YAML, without aliases and without a key twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{place}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"a value that YAML does not know ({error})") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader builds words, numbers, lists and tables only, and refuses every tag of Python's."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        problem = "an alias" if self.check_event(yaml.AliasEvent) else None
        if self.depth == DEEPEST_YAML:
            problem = "it is nested too deeply"
        if problem is not None:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise yaml.MarkedYAMLError(problem="a key appears twice", problem_mark=node.start_mark)
        return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {quote(key)} appears twice")
        values[key] = value
    return values


def _not_finite(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
