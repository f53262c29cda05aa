"""What a saved program declares: its functions' tensors, and whether OPERATORS can run its operations."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import Tensor

from anequant.errors import InputError, UnsupportedError
from anequant.targets.coreml.interpreter.operators import COMPUTING, OPERATORS
from anequant.targets.coreml.storage import STRING, Palettized, Weights, data_type

Form = Literal["stored", "float32", "palettized", "plain"]
"""How an operation takes a value: a tensor as stored, a tensor with fp16 widened, a table that may still be
codes, or plain Python numbers."""

ARGMAX = "reduce_argmax"
_STATE_INPUTS = {"read_state": ("input",), "write_state": ("input", "data")}


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor; a size of None is known only when running."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        pairs = zip(self.shape, shape, strict=False)
        return len(shape) == len(self.shape) and all(size in (None, actual) for size, actual in pairs)


@dataclass(frozen=True)
class FunctionSpec:
    """What a function takes and gives; `enumerated` lists the only shapes that some inputs may have, and
    `choices` how many values each reduce_argmax chooses from, None where that is known only when running."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...]
    enumerated: Mapping[str, tuple[tuple[int, ...], ...]]
    choices: tuple[int | None, ...]


@dataclass(frozen=True)
class Parameter:
    """How an operation takes one of its inputs; `choices` are the supported values, if only some are."""

    form: Form
    variadic: bool
    required: bool
    choices: tuple[Any, ...]


@cache
def parameters(kind: str) -> Mapping[str, Parameter]:
    """The inputs of an operation, from the signature of its function."""
    if kind in _STATE_INPUTS:
        return {name: Parameter("stored", False, True, ()) for name in _STATE_INPUTS[kind]}
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


def tensor_spec(name: str, value_type: Any) -> TensorSpec:
    """A MIL_pb2.ValueType of a tensor, or of a state that holds one."""
    kind = value_type.WhichOneof("type")
    tensor = value_type.stateType.wrappedType.tensorType if kind == "stateType" else value_type.tensorType
    if kind not in ("stateType", "tensorType"):
        raise UnsupportedError(f"'{name}' is a {kind}, not a tensor")
    shape = tuple(dim.constant.size if dim.HasField("constant") else None for dim in tensor.dimensions)
    return TensorSpec(name, data_type(tensor).name, shape)


def constant_spec(name: str, value_type: Any) -> TensorSpec:
    """As `tensor_spec`, where the value may also be a string."""
    if value_type.tensorType.dataType == STRING:
        return TensorSpec(name, "string", ())
    return tensor_spec(name, value_type)


def block_of(function: Any, where: str) -> Any:
    """The one MIL_pb2.Block of a function."""
    if function.opset not in function.block_specializations:
        raise InputError(f"no block for the opset {function.opset}", where=where)
    return function.block_specializations[function.opset]


def function_spec(function: Any, block: Any, features: Any) -> FunctionSpec:
    """`features` are the input descriptions of the function, which alone know enumerated shapes."""
    is_state = [value.type.WhichOneof("type") == "stateType" for value in function.inputs]
    given = [tensor_spec(value.name, value.type) for value in function.inputs]
    types = {value.name: value.type for value in function.inputs}
    types.update({value.name: value.type for operation in block.operations for value in operation.outputs})
    arrays = {feature.name: feature.type.multiArrayType for feature in features}
    enumerated = {
        name: tuple(tuple(shape.shape) for shape in array.enumeratedShapes.shapes)
        for name, array in arrays.items()
        if array.HasField("enumeratedShapes")
    }
    return FunctionSpec(
        tuple(spec for spec, state in zip(given, is_state, strict=True) if not state),
        tuple(tensor_spec(name, types[name]) for name in block.outputs),
        tuple(spec for spec, state in zip(given, is_state, strict=True) if state),
        enumerated,
        tuple(_chosen_from(operation, types) for operation in block.operations if operation.type == ARGMAX),
    )


def _chosen_from(operation: Any, types: Mapping[str, Any]) -> int | None:
    (given,) = operation.inputs["x"].arguments
    shape = tensor_spec(given.name, types[given.name]).shape
    return shape[-1] if shape else 1


def refuse_unsupported(functions: Mapping[str, Any], weights: Weights, where: str) -> None:
    """UnsupportedError that lists every operation, input or choice of the functions that cannot be run."""
    problems: list[str] = []
    for name in sorted(functions):
        problems += _problems(name, functions[name], weights)
    if problems:
        raise UnsupportedError(f"cannot interpret {'; '.join(problems)}", where=where)


def _problems(name: str, function: Any, weights: Weights) -> Iterator[str]:
    block = block_of(function, name)
    constants: dict[str, Any] = {}
    defined = {value.name for value in function.inputs}
    for operation in block.operations:
        kind = operation.type
        label = operation.outputs[0].name if operation.outputs else ""
        what = f"{kind} '{label}' in function '{name}'"
        if kind == "const":
            constants[label] = operation.attributes["val"]
        elif kind not in OPERATORS and kind not in _STATE_INPUTS:
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
    known = parameters(operation.type)
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
