"""What a saved program declares: the tensors that its functions take, give and keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from anequant.errors import InputError, UnsupportedError
from anequant.targets.coreml.storage import STRING, read_data_type

ARGMAX = "reduce_argmax"


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


def read_tensor_spec(name: str, value_type: Any) -> TensorSpec:
    """Read a MIL_pb2.ValueType of a tensor, or of a state that holds one."""
    kind = value_type.WhichOneof("type")
    tensor = value_type.stateType.wrappedType.tensorType if kind == "stateType" else value_type.tensorType
    if kind not in ("stateType", "tensorType"):
        raise UnsupportedError(f"'{name}' is a {kind}, not a tensor")
    shape = tuple(dim.constant.size if dim.HasField("constant") else None for dim in tensor.dimensions)
    return TensorSpec(name, read_data_type(tensor).name, shape)


def read_constant_spec(name: str, value_type: Any) -> TensorSpec:
    """Do as `read_tensor_spec`, where the value may also be a string."""
    if value_type.tensorType.dataType == STRING:
        return TensorSpec(name, "string", ())
    return read_tensor_spec(name, value_type)


def find_block(function: Any, where: str) -> Any:
    """Find the one MIL_pb2.Block of a function."""
    if function.opset not in function.block_specializations:
        raise InputError(f"no block for the opset {function.opset}", where=where)
    return function.block_specializations[function.opset]


def read_functions(model: Any, where: str) -> Iterator[tuple[str, Any, FunctionSpec]]:
    """Yield the name of every function of a Model_pb2.Model, its block, and what it declares."""
    features = {part.name: part.input for part in model.description.functions}
    for name, function in sorted(model.mlProgram.functions.items()):
        block = find_block(function, where)
        yield name, block, read_function_spec(function, block, features.get(name, model.description.input))


def read_function_spec(function: Any, block: Any, features: Any) -> FunctionSpec:
    """Read what a function declares; `features` describe its inputs, and alone know enumerated shapes."""
    is_state = [value.type.WhichOneof("type") == "stateType" for value in function.inputs]
    given = [read_tensor_spec(value.name, value.type) for value in function.inputs]
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
        tuple(read_tensor_spec(name, types[name]) for name in block.outputs),
        tuple(spec for spec, state in zip(given, is_state, strict=True) if state),
        enumerated,
        tuple(_chosen_from(operation, types) for operation in block.operations if operation.type == ARGMAX),
    )


def _chosen_from(operation: Any, types: Mapping[str, Any]) -> int | None:
    (given,) = operation.inputs["x"].arguments
    shape = read_tensor_spec(given.name, types[given.name]).shape
    return shape[-1] if shape else 1
