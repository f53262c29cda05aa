"""An asset's functions as a listing to look at, whoever wrote it: read by Apple's parser in another process.

Nothing here runs an operation, or depends on what anequant records of an asset.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from anequant.errors import InputError
from anequant.targets.coreai.installed import require_installed
from anequant.targets.coreai.worker import DESCRIBE
from anequant.targets.coreai.worker_process import run_job

LONGEST = 600.0
"""Seconds after which the parser counts as hanging: a program of a hundred thousand operations takes ten."""

ATTEMPTS = 3
"""A program below 16 KB is read into memory wherever there is room, and refused at most addresses."""

CONSTANT, TOKEN, OPAQUE = "constant", "token", "opaque"
HANDLE = re.compile(r"!coreai\.handle<(.*)>")
TENSOR = re.compile(r"tensor<((?:(?:\d+|\?)x)*)([A-Za-z]\w*)(?:, (.*))?>")
NUMBER = re.compile(r"(bf|si|ui|f|i)(\d+)")
NAMES = {"f": "float", "bf": "bfloat", "si": "int", "ui": "uint", "i": "int"}


@dataclass(frozen=True)
class Form:
    """What a value is: its dtype as numpy would call it, its shape with None for an axis of any length.

    `state` is a buffer that a function reads and writes; `layout` is how a buffer has to lie in memory, as
    the program has it, "" where it may lie as it likes.
    """

    dtype: str
    shape: tuple[int | None, ...]
    state: bool = False
    layout: str = ""

    @property
    def bits(self) -> int:
        """Of each number; 0 where it is none."""
        found = re.search(r"\d+", self.dtype)
        return 1 if self.dtype == "bool" else int(found[0]) if found else 0

    @property
    def values(self) -> int:
        """How many numbers there are, an axis of any length counted as one."""
        return math.prod(size if size is not None else 1 for size in self.shape)


@dataclass(frozen=True)
class Port:
    """What a function takes, keeps or gives."""

    name: str
    form: Form


@dataclass(frozen=True)
class Given:
    """What is known of a constant: its name among the file's blobs, "" for one of the program itself, whose
    numbers are here where they are few, and whose least and greatest are `ends`."""

    name: str = ""
    numbers: tuple[float, ...] | None = None
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Operation:
    """What is computed from values into values, by their numbers in the function."""

    number: int
    kind: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    given: Given | None = None


@dataclass(frozen=True)
class ListedFunction:
    """A function: whether a host may call it, its ports, every value's form, and its operations in order."""

    name: str
    public: bool
    inputs: tuple[Port, ...]
    states: tuple[Port, ...]
    outputs: tuple[Port, ...]
    forms: tuple[Form, ...]
    operations: tuple[Operation, ...]

    @cached_property
    def producers(self) -> dict[int, Operation]:
        """The operation that makes each value; arguments have none."""
        return {number: operation for operation in self.operations for number in operation.results}

    @cached_property
    def consumers(self) -> dict[int, list[Operation]]:
        found: dict[int, list[Operation]] = {}
        for operation in self.operations:
            for number in dict.fromkeys(operation.operands):
                found.setdefault(number, []).append(operation)
        return found

    def of_kind(self, *kinds: str) -> Iterator[Operation]:
        return (operation for operation in self.operations if operation.kind in kinds)

    def computing(self) -> Iterator[Operation]:
        return (operation for operation in self.operations if operation.kind != CONSTANT)

    def source(self, operation: Operation, place: int) -> Operation | None:
        """What makes the operand at a place, None for an argument or one that is not there."""
        if place >= len(operation.operands):
            return None
        return self.producers.get(operation.operands[place])

    def operand(self, operation: Operation, place: int) -> Form | None:
        return self.forms[operation.operands[place]] if place < len(operation.operands) else None

    def result(self, operation: Operation) -> Form | None:
        return self.forms[operation.results[0]] if operation.results else None

    def call(self, operation: Operation) -> str:
        """A name to find an operation by: a constant's, else its kind and that of the nearest constant."""
        if operation.given is not None and operation.given.name:
            return operation.given.name
        layer: list[Operation] = [operation]
        for _ in range(3):
            layer = [
                source
                for item in layer
                for number in reversed(item.operands)
                if (source := self.producers.get(number)) is not None
            ]
            for source in layer:
                if source.given is not None and source.given.name:
                    return f"{operation.kind} of {source.given.name}"
        return f"{operation.kind} {operation.number}"


def read_listing(asset: Path) -> tuple[ListedFunction, ...]:
    """Read an asset's functions, with Apple's package in a process of its own.

    Raises UnsupportedError where that is not installed, InputError where it does not read the asset.
    """
    require_installed()
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "listing.json"
        failure = None
        for _ in range(ATTEMPTS):
            failure = run_job(DESCRIBE, (asset, target), "while it read the functions", LONGEST)
            if failure is None:
                break
        if failure is None and not target.is_file():
            failure = "ended without having read the functions"
        if failure is not None:
            raise InputError(
                f"Apple's parser {failure}",
                where=str(asset),
                remedy="write the asset again, it may be damaged",
            )
        return make_listing(json.loads(target.read_text(encoding="utf-8")))


def make_listing(content: dict[str, Any]) -> tuple[ListedFunction, ...]:
    """The functions of what `describe` wrote."""
    forms = [read_form(text) for text in content["types"]]
    return tuple(_make_function(item, forms) for item in content["functions"])


def read_form(text: str) -> Form:
    """The form of a type as MLIR prints it; what is neither tensor nor handle is a token or opaque."""
    if text == "!coreai.token":
        return Form(TOKEN, ())
    handle = HANDLE.fullmatch(text)
    found = TENSOR.fullmatch(text if handle is None else handle[1])
    if found is None:
        return Form(OPAQUE, ())
    shape = tuple(None if size == "?" else int(size) for size in found[1].split("x")[:-1])
    return Form(_name_dtype(found[2]), shape, handle is not None, found[3] or "")


def _name_dtype(text: str) -> str:
    found = NUMBER.fullmatch(text)
    if text == "i1":
        return "bool"
    return text.lower() if found is None else f"{NAMES[found[1]]}{found[2]}"


def _make_function(item: dict[str, Any], forms: Sequence[Form]) -> ListedFunction:
    arguments = [Port(name, read_form(text)) for name, text in item["inputs"]]
    results = [Port(name, read_form(text)) for name, text in item["outputs"]]
    return ListedFunction(
        item["name"],
        item["public"],
        tuple(port for port in arguments if not port.form.state),
        tuple(port for port in arguments if port.form.state),
        tuple(port for port in results if port.form.dtype != TOKEN),
        tuple(forms[number] for number in item["values"]),
        tuple(_make_operation(number, *entry) for number, entry in enumerate(item["operations"])),
    )


def _make_operation(
    number: int, kind: str, operands: list[int], results: list[int], given: dict[str, Any] | None = None
) -> Operation:
    short = re.sub(r"^coreaix?\.(decomposable\.broadcasting_|decomposable\.)?", "", kind)
    constant = None
    if given is not None:
        numbers, ends = given.get("numbers"), given.get("range")
        constant = Given(
            given.get("name", ""),
            None if numbers is None else tuple(numbers),
            None if ends is None else (ends[0], ends[1]),
        )
    return Operation(number, short, tuple(operands), tuple(results), constant)
