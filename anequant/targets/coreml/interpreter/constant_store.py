"""The constants of a program: what is known before it runs, read when first needed and then kept.

A constant is kept in the form its user takes, under what it is made of. So functions that point to the same
place of the weight file share it, and a palettized weight of a convolution is kept as one float32 matrix.
The compressed ones can also be read as they are on disk: codes, what they mean, and where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anequant.errors import InputError
from anequant.targets.coreml.interpreter.operators import OPERATORS
from anequant.targets.coreml.interpreter.supported import Form, read_parameters
from anequant.targets.coreml.signatures import TensorSpec, read_constant_spec, read_tensor_spec
from anequant.targets.coreml.storage import TORCH_TYPES, Palettized, Value, Weights
from anequant.targets.shared.packed_codes import CompressedWeight

WIDENED = (torch.float16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Constant:
    """A value that is yet to be read. Equal keys are equal values, whichever function they appear in.

    `kind` is the operation that makes it, and `parts` are what that takes.
    """

    key: bytes
    load: Callable[[], Value]
    kind: str
    spec: TensorSpec
    parts: Mapping[str, Constant] = field(default_factory=dict)


class Constants:
    """`storages` are the addresses of the tensors handed out: nobody may write to them."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._kept: dict[tuple[bytes, Form], Any] = {}
        self.storages: set[int] = set()

    def read_block(self, block: Any) -> dict[str, Constant]:
        """Return the results of the const and constexpr operations of a MIL_pb2.Block, by name."""
        known: dict[str, Constant] = {}
        for operation in block.operations:
            if operation.type == "const":
                known[operation.outputs[0].name] = self._literal(operation.attributes["val"])
            elif operation.type.startswith("constexpr_"):
                sources = {}
                for name, argument in sorted(operation.inputs.items()):
                    source = self.find_bound(argument.arguments[0], known)
                    if source is None:
                        raise InputError(f"'{name}' of '{operation.outputs[0].name}' is not a constant")
                    sources[name] = source
                known[operation.outputs[0].name] = _combine(operation, sources)
        return known

    def find_bound(self, binding: Any, known: Mapping[str, Constant]) -> Constant | None:
        """Return what an argument is bound to, by value or by name; None if it is computed while running."""
        if binding.WhichOneof("binding") == "value":
            return self._literal(binding.value)
        return known.get(binding.name)

    def get(self, constant: Constant, form: Form) -> Any:
        key = (constant.key, form)
        if key not in self._kept:
            value = convert_form(constant.load(), form)
            if isinstance(value, Tensor):
                self.storages.add(storage_of(value))
            self._kept[key] = value
        return self._kept[key]

    def _literal(self, value: Any) -> Constant:
        key = value.SerializeToString(deterministic=True)
        return Constant(key, partial(self._weights.read, value), "const", read_constant_spec("", value.type))


def convert_form(value: Value, form: Form) -> Any:
    """Return a value in the form that an operation takes it."""
    if isinstance(value, str) or form == "palettized":
        return value
    if isinstance(value, Palettized):
        value = value.dense(torch.float32 if form == "float32" else None)
    if form == "plain":
        return value.tolist()
    return value.float() if form == "float32" and value.dtype in WIDENED else value


def storage_of(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor shares with its views."""
    return tensor.untyped_storage().data_ptr()


def _combine(operation: Any, sources: Mapping[str, Constant]) -> Constant:
    takes = read_parameters(operation.type)
    spec = read_tensor_spec(operation.outputs[0].name, operation.outputs[0].type)

    def load() -> Value:
        arguments = {name: convert_form(source.load(), takes[name].form) for name, source in sources.items()}
        value: Value = OPERATORS[operation.type](**arguments)
        return value.to(TORCH_TYPES[spec.dtype]) if isinstance(value, Tensor) else value

    key = repr((operation.type, spec.dtype, [(name, source.key) for name, source in sources.items()]))
    return Constant(key.encode(), load, operation.type, spec, sources)


def read_compressed(block: Any, constants: Mapping[str, Constant]) -> Iterator[tuple[str, CompressedWeight]]:
    """Yield the value's name and the content of every compressed constant of a MIL_pb2.Block, from disk.

    A lookup table's result that is scaled is part of the scaled constant, not one of its own.
    """
    made = {operation.outputs[0].name: operation for operation in block.operations if operation.outputs}
    blocks = [operation for operation in made.values() if operation.type == "constexpr_blockwise_shift_scale"]
    scaled = {operation.inputs["data"].arguments[0].name for operation in blocks}
    for name, operation in made.items():
        table = operation.type == "constexpr_lut_to_dense" and name not in scaled
        if not table and operation not in blocks:
            continue
        parts = constants[name].parts
        value = (constants[name] if table else parts["data"]).load()
        scale = None if table else parts["scale"].load()
        assert isinstance(value, (Tensor, Palettized))
        codes, codebook = (value.codes, value.codebook) if isinstance(value, Palettized) else (value, None)
        yield (
            name,
            CompressedWeight(
                codes.numpy(),
                None if codebook is None else codebook.numpy(),
                scale.numpy() if isinstance(scale, Tensor) else None,
                _find_place(operation, made),
            ),
        )


def _find_place(operation: Any, made: Mapping[str, Any]) -> int | None:
    key = "indices" if operation.type == "constexpr_lut_to_dense" else "data"
    binding = operation.inputs[key].arguments[0]
    if binding.WhichOneof("binding") == "name":
        return _find_place(made[binding.name], made)
    return binding.value.blobFileValue.offset if binding.value.HasField("blobFileValue") else None
