"""Which operations, inputs and choices of a program can be run, by the signatures of OPERATORS."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.targets.coreml.interpreter.operators import COMPUTING, OPERATORS
from anequant.targets.coreml.signatures import find_block
from anequant.targets.coreml.storage import Palettized, Weights

Form = Literal["stored", "float32", "palettized", "plain"]
"""How an operation takes a value: a tensor as stored, a tensor with fp16 widened, a table that may still be
codes, or plain Python numbers."""

STATE_INPUTS = {"read_state": ("input",), "write_state": ("input", "data")}


@dataclass(frozen=True)
class Parameter:
    """How an operation takes one of its inputs; `choices` are the supported values, if only some are."""

    form: Form
    variadic: bool
    required: bool
    choices: tuple[Any, ...]


@cache
def read_parameters(kind: str) -> Mapping[str, Parameter]:
    """Read the inputs of an operation from the signature of its function."""
    if kind in STATE_INPUTS:
        return {name: Parameter("stored", False, True, ()) for name in STATE_INPUTS[kind]}
    function = OPERATORS[kind]
    hints = typing.get_type_hints(function)
    result = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, Tensor)
        options = set(typing.get_args(hint)) or {hint}
        form: Form = "plain"
        if Palettized in options:
            form = "palettized"
        elif Tensor in options:
            form = "float32" if kind in COMPUTING else "stored"
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        variadic = hint == list[Tensor]
        result[name] = Parameter(form, variadic, parameter.default is inspect.Parameter.empty, choices)
    return result


def refuse_unsupported(functions: Mapping[str, Any], weights: Weights, where: str) -> None:
    """Raise UnsupportedError with every operation, input or choice of the functions that cannot be run."""
    problems: list[str] = []
    for name in sorted(functions):
        problems += _problems(name, functions[name], weights)
    if problems:
        raise UnsupportedError(f"cannot interpret {'; '.join(problems)}", where=where)


def _problems(name: str, function: Any, weights: Weights) -> Iterator[str]:
    block = find_block(function, name)
    constants: dict[str, Any] = {}
    defined = {value.name for value in function.inputs}
    for operation in block.operations:
        kind = operation.type
        label = operation.outputs[0].name if operation.outputs else ""
        what = f"{kind} '{label}' in function '{name}'"
        if kind == "const":
            constants[label] = operation.attributes["val"]
        elif kind not in OPERATORS and kind not in STATE_INPUTS:
            yield what
        else:
            for problem in _input_problems(operation, constants, defined, weights):
                yield f"{what}: {problem}"
        for output in operation.outputs:
            if output.name in defined:
                yield f"{what}: a second value named '{output.name}'"
            defined.add(output.name)
    for output in block.outputs:
        if output not in defined:
            yield f"output '{output}' of function '{name}', which nothing defines"


def _input_problems(
    operation: Any, constants: Mapping[str, Any], defined: set[str], weights: Weights
) -> Iterator[str]:
    known = read_parameters(operation.type)
    for name in sorted(set(operation.attributes) - {"name"} | set(operation.inputs) - set(known)):
        yield f"input '{name}'"
    for name in sorted(name for name in known if known[name].required and name not in operation.inputs):
        yield f"no input '{name}'"
    for name in sorted(set(known) & set(operation.inputs)):
        bindings = operation.inputs[name].arguments
        if len(bindings) != 1 and not known[name].variadic:
            yield f"{len(bindings)} values for '{name}'"
        for binding in bindings:
            if binding.WhichOneof("binding") == "name" and binding.name not in defined:
                yield f"input '{binding.name}', which nothing defines"
            value = binding.value if binding.WhichOneof("binding") == "value" else constants.get(binding.name)
            if known[name].choices and value is not None:
                content = weights.read(value)
                choice = content if isinstance(content, str) else content.tolist()
                if choice not in known[name].choices:
                    yield f"{name}={choice}"
