"""What the rules look at: an asset, the bundle around it, and its functions by Apple's contract."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.targets.coreai.bundle import METADATA
from anequant.targets.coreai.design import EXTEND, GATHER, LOAD, PREFILL
from anequant.targets.coreai.listing import Form, ListedFunction, Port

TRANSFORMER = re.compile(rf"({EXTEND}|{PREFILL})_(\d+)_(\d+)")
GATHERING = re.compile(rf"{GATHER}_(\d+)")


@dataclass(frozen=True)
class Transformer:
    """A function that a runner takes for `length` positions of a `context`, by its name."""

    kind: str
    context: int
    length: int
    function: ListedFunction

    @property
    def caches(self) -> tuple[Port, ...]:
        """The caches, be they states or inputs."""
        return tuple(port for port in (*self.function.states, *self.function.inputs) if "cache" in port.name)


@dataclass(frozen=True)
class Linted:
    """An asset; `bundle` is the folder around it, None where it is looked at alone.

    `functions` are there for rules about them, not for those about files.
    """

    asset: Path
    bundle: Path | None = None
    functions: tuple[ListedFunction, ...] = ()

    @property
    def metadata(self) -> dict[str, Any]:
        """The bundle's metadata.json, empty where there is none or it is no object."""
        if self.bundle is None:
            return {}
        try:
            found = json.loads((self.bundle / METADATA).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def language(self, key: str) -> int | None:
        """A number of what metadata.json says of the model, None where it says none."""
        language = self.metadata.get("language")
        found = language.get(key) if isinstance(language, dict) else None
        return found if type(found) is int else None

    @property
    def names(self) -> set[str]:
        return {function.name for function in self.functions if function.public}

    @property
    def static(self) -> bool:
        """Whether Apple's runner takes it for the Neural Engine's (ModelStructure.swift)."""
        return LOAD in self.names and any(name.startswith(EXTEND) for name in self.names)

    def transformers(self) -> Iterator[Transformer]:
        """The functions of the transformer whose names tell context and window."""
        for function in self.functions:
            found = TRANSFORMER.fullmatch(function.name)
            if found is not None and function.public:
                yield Transformer(found[1], int(found[2]), int(found[3]), function)

    def gathers(self) -> dict[int, ListedFunction]:
        """The functions that look tokens up, by how many at once."""
        found = {}
        for function in self.functions:
            name = GATHERING.fullmatch(function.name)
            if name is not None and function.public:
                found[int(name[1])] = function
        return found


def find_form(ports: tuple[Port, ...], name: str) -> Form | None:
    """The form of a port by its name, None where there is none."""
    return next((port.form for port in ports if port.name == name), None)


def show_shape(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
