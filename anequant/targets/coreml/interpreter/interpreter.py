"""Runs a saved Core ML package on the CPU with torch.

Tensors are stored as the package declares them and computed in float32: every fp16 value is what a machine
with fp16 storage and fp32 accumulation holds. Convolutions of integers are exact (see `integers`). States
live in a dictionary that the caller keeps, so the functions of one package, and several packages, share them
by name.

    package = Package.open("decoder.mlpackage")
    state = package.new_state()
    outputs = package.run({"hidden_states": x, "current_pos": position}, state, function="prefill")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anequant.errors import InputError, UnsupportedError, did_you_mean
from anequant.targets.coreml.interpreter.constant_store import (
    Constants,
    convert_form,
    read_compressed,
    storage_of,
)
from anequant.targets.coreml.interpreter.integers import find_integer_operands, integer_conv, skip_rounding
from anequant.targets.coreml.interpreter.movement import Operator
from anequant.targets.coreml.interpreter.operators import OPERATORS
from anequant.targets.coreml.interpreter.supported import Form, read_parameters, refuse_unsupported
from anequant.targets.coreml.signatures import (
    FunctionSpec,
    TensorSpec,
    read_functions,
    read_tensor_spec,
)
from anequant.targets.coreml.storage import TORCH_TYPES, Weights, damage, find_model_file, read_model
from anequant.targets.shared.packed_codes import CompressedWeight


@dataclass(frozen=True)
class _Use:
    """A value computed while running, in the form that one operation takes it."""

    name: str
    form: Form


@dataclass(frozen=True)
class _Step:
    """One operation with its constants in place, which `run` computes. After it, nothing reads the values
    `frees` again, nor the present content of the states `replaces`."""

    kind: str
    run: Operator | None
    arguments: dict[str, Any]
    outputs: tuple[TensorSpec, ...]
    frees: frozenset[str] = frozenset()
    replaces: frozenset[str] = frozenset()


class Package:
    """An opened .mlpackage: its `path`, its `functions` by name, and the `default_function`."""

    def __init__(self, path: Path, model: Any, weights: Weights, *, rounding: bool = True) -> None:
        refuse_unsupported(model.mlProgram.functions, weights, str(path))
        read = list(read_functions(model, str(path)))
        self.path = path
        self.default_function: str = model.description.defaultFunctionName or "main"
        self.functions = {name: spec for name, _, spec in read}
        self._blocks = {name: block for name, block, _ in read}
        self._constants = Constants(weights)
        self._rounding = rounding
        self._prepared: dict[str, tuple[list[_Step], dict[str, Any]]] = {}

    @classmethod
    def open(cls, path: str | Path, *, rounding: bool = True) -> Package:
        """Read everything but the weights. Without `rounding`, what takes the result of quantize and
        dequantize takes their input instead. InputError if the package is damaged; UnsupportedError, listing
        all of them, if it has operations, or inputs of operations, that cannot be run."""
        file = find_model_file(Path(path))
        with damage(str(path)):
            return cls(Path(path), read_model(file), Weights(file.parent), rounding=rounding)

    def new_state(self) -> dict[str, Tensor]:
        """Return zeros for every state of every function, by name."""
        specs = [state for function in self.functions.values() for state in function.states]
        return {
            spec.name: torch.zeros([size or 0 for size in spec.shape], dtype=TORCH_TYPES[spec.dtype])
            for spec in specs
        }

    def run(
        self,
        inputs: Mapping[str, Tensor | np.ndarray[Any, Any]],
        state: dict[str, Tensor] | None = None,
        function: str | None = None,
    ) -> dict[str, Tensor]:
        """Return the outputs of a function by name; `state` is updated in place.

        InputError if an input or a state is missing, unknown, or not of the declared shape and type.
        """
        name = self.default_function if function is None else function
        if name not in self.functions:
            remedy = did_you_mean(name, self.functions)
            raise InputError(f"no function '{name}'", where=str(self.path), remedy=remedy)
        where = f"{self.path}, function '{name}'"
        spec = self.functions[name]
        values = {tensor.name: _take_input(tensor, inputs, spec, where) for tensor in spec.inputs}
        for unknown in sorted(set(inputs) - set(values)):
            raise InputError(f"unknown input '{unknown}'", where=where, remedy=did_you_mean(unknown, values))
        states = {} if state is None else state
        for tensor in spec.states:
            _check(tensor, states.get(tensor.name), f"state '{tensor.name}'", where)
        if name not in self._prepared:
            with damage(where):
                self._prepared[name] = self._prepare(name)
        steps, outputs = self._prepared[name]
        with torch.no_grad(), damage(where):
            for step in steps:
                self._execute(step, values, states, where)
            return {key: _resolve(output, values).clone() for key, output in outputs.items()}

    def read_compressed_weights(self) -> Iterator[tuple[str, str, CompressedWeight]]:
        """Yield every compressed constant as (function, name of its value, content), read from disk."""
        for name, block in self._blocks.items():
            for value, content in read_compressed(block, self._constants.read_block(block)):
                yield name, value, content

    def _execute(self, step: _Step, values: dict[str, Tensor], states: dict[str, Tensor], where: str) -> None:
        """Compute one step of a run: results go to `values` or `states`, and what it frees leaves them."""
        arguments = {name: _resolve(argument, values) for name, argument in step.arguments.items()}
        for name in step.frees:
            values.pop(name, None)
        if step.kind == "write_state":
            data = arguments["data"]
            constant = storage_of(data) in self._constants.storages
            states[arguments["input"]] = data.clone() if constant else data
            return
        if step.kind == "slice_update":
            needed = [*values.values(), arguments["update"]]
            needed += [states[name] for name in states if name not in step.replaces]
            storage = storage_of(arguments["x"])
            if storage in self._constants.storages or storage in map(storage_of, needed):
                arguments["x"] = arguments["x"].clone()
        if step.kind == "read_state":
            results: tuple[Tensor, ...] = (states[arguments["input"]],)
        else:
            results = _call(step, arguments, where)
        for spec, result in zip(step.outputs, results, strict=True):
            value = result.to(TORCH_TYPES[spec.dtype])
            if not spec.fits(tuple(value.shape)):
                problem = f"'{spec.name}' ({step.kind}) is {tuple(value.shape)}, declared {spec.shape}"
                raise InputError(problem, where=where)
            if spec.name not in step.frees:
                values[spec.name] = value

    def _prepare(self, name: str) -> tuple[list[_Step], dict[str, Any]]:
        block = self._blocks[name]
        constants = self._constants.read_block(block)
        states = {state.name for state in self.functions[name].states}

        producers: dict[str, Any] = {}

        def argument(binding: Any, form: Form) -> Any:
            if binding.name in states:
                return binding.name
            binding = binding if self._rounding else skip_rounding(binding, producers)
            constant = self._constants.find_bound(binding, constants)
            return self._constants.get(constant, form) if constant else _Use(binding.name, form)

        steps = []
        for operation in block.operations:
            producers.update({output.name: operation for output in operation.outputs})
            if operation.outputs and operation.outputs[0].name in constants:
                continue
            arguments = {}
            for key, bound in sorted(operation.inputs.items()):
                parameter = read_parameters(operation.type)[key]
                listed = [argument(binding, parameter.form) for binding in bound.arguments]
                arguments[key] = listed if parameter.variadic else listed[0]
            run = OPERATORS.get(operation.type)
            operands = find_integer_operands(operation, producers, constants, self._constants)
            if operands and self._rounding:
                codes, parts = operands
                run, arguments["x"] = integer_conv, argument(codes, "float32")
                arguments |= {key: self._constants.get(part, "float32") for key, part in parts.items()}
            outputs = tuple(read_tensor_spec(output.name, output.type) for output in operation.outputs)
            steps.append(_Step(operation.type, run, arguments, outputs))
        results = {}
        for output in block.outputs:
            constant = constants.get(output)
            results[output] = self._constants.get(constant, "stored") if constant else _Use(output, "stored")
        return _with_lifetimes(steps, set(block.outputs)), results


def _with_lifetimes(steps: Sequence[_Step], live: set[str]) -> list[_Step]:
    """Return the steps with what each `frees` and `replaces`; the values `live` are read after the last."""
    overwritten: set[str] = set()
    found = []
    for step in reversed(steps):
        listed = [item if isinstance(item, list) else [item] for item in step.arguments.values()]
        used = {item.name for items in listed for item in items if isinstance(item, _Use)}
        frees = frozenset((used | {output.name for output in step.outputs}) - live)
        found.append(replace(step, frees=frees, replaces=frozenset(overwritten)))
        live = live | used
        if step.kind == "write_state":
            overwritten.add(step.arguments["input"])
        elif step.kind == "read_state":
            overwritten.discard(step.arguments["input"])
    return found[::-1]


def _call(step: _Step, arguments: Mapping[str, Any], where: str) -> tuple[Tensor, ...]:
    assert step.run is not None
    try:
        result = step.run(**arguments)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error.what} ('{step.outputs[0].name}')", where=where) from error
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise InputError(f"'{step.outputs[0].name}' ({step.kind}) failed: {error}", where=where) from error
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _resolve(argument: Any, values: Mapping[str, Tensor]) -> Any:
    if isinstance(argument, list):
        return [_resolve(item, values) for item in argument]
    return convert_form(values[argument.name], argument.form) if isinstance(argument, _Use) else argument


def _take_input(spec: TensorSpec, inputs: Mapping[str, Any], function: FunctionSpec, where: str) -> Tensor:
    given = inputs.get(spec.name)
    value = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    what = f"input '{spec.name}'"
    checked = _check(spec, value, what, where)
    allowed = function.enumerated.get(spec.name, (tuple(checked.shape),))
    if tuple(checked.shape) not in allowed:
        raise InputError(f"{what} has shape {tuple(checked.shape)}, allowed {list(allowed)}", where=where)
    return checked.clone()


def _check(spec: TensorSpec, value: Tensor | None, what: str, where: str) -> Tensor:
    if value is None:
        raise InputError(f"missing {what}", where=where)
    if not spec.fits(tuple(value.shape)):
        raise InputError(f"{what} has shape {tuple(value.shape)}, declared {spec.shape}", where=where)
    if value.dtype != TORCH_TYPES[spec.dtype]:
        raise InputError(f"{what} is {value.dtype}, declared {spec.dtype}", where=where)
    return value
