"""Core ML itself, on a Mac: it runs packages as the interpreter does, and says where it places operations."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.targets.coreml.graph import read_graphs
from anequant.targets.coreml.signatures import FunctionSpec
from anequant.targets.coreml.toolkit import ct

UNKNOWN = "unknown"
NEURAL_ENGINE = "neural engine"
DEVICES = {
    "MLCPUComputeDevice": "cpu",
    "MLGPUComputeDevice": "gpu",
    "MLNeuralEngineComputeDevice": NEURAL_ENGINE,
}
CONSTANT = "const"
"""How the names of operations begin that compute nothing at run time."""


class DevicePackage:
    """Loads each function when it is first run; the compute units are CPU and Neural Engine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._functions: dict[str | None, Any] = {}

    @classmethod
    def open(cls, path: Path) -> DevicePackage:
        """Open a package; raises UnsupportedError anywhere but on macOS."""
        if platform.system() != "Darwin":
            raise UnsupportedError(
                "Core ML runs on macOS only",
                remedy="use the interpreter or the transformers backend here",
            )
        return cls(path)

    @property
    def functions(self) -> dict[str, FunctionSpec]:
        """What the package's file declares, by name."""
        return {graph.function: graph.spec for graph in read_graphs(self.path)}

    def new_state(self) -> Any:
        """Return a state that all packages of a set share."""
        return self._function("prefill").make_state()

    def run(
        self, inputs: Mapping[str, Tensor], state: Any = None, function: str | None = None
    ) -> dict[str, Tensor]:
        """Return the outputs by name; the state changes in place."""
        arrays = {name: value.numpy() for name, value in inputs.items()}
        outputs = self._function(function).predict(arrays, state=state)
        return {name: torch.from_numpy(np.asarray(value)) for name, value in outputs.items()}

    def _function(self, name: str | None) -> Any:
        if name not in self._functions:
            units = ct.ComputeUnit.CPU_AND_NE
            with _without_variables(self.path.absolute()) as path:
                self._functions[name] = ct.models.MLModel(path, compute_units=units, function_name=name)
        return self._functions[name]


@contextmanager
def _without_variables(path: Path) -> Iterator[str]:
    """Yield the absolute path of a package, or of a link to it: coremltools expands variables in a path."""
    if "$" not in str(path):
        yield str(path)
        return
    with TemporaryDirectory() as folder:
        link = Path(folder) / "linked.mlpackage"
        link.symlink_to(path)
        yield str(link)


@dataclass(frozen=True)
class Placement:
    """One operation: the device the plan prefers, those that could run it, and its share of the cost.

    `device` is "unknown" and `cost` None where the plan says nothing.
    """

    function: str
    operator: str
    output: str
    device: str
    supported: tuple[str, ...]
    cost: float | None


def ask_placements(package: Path) -> list[Placement]:
    """Compile a package and ask MLComputePlan for CPU and Neural Engine.

    Raises UnsupportedError anywhere but on macOS.
    """
    package = DevicePackage.open(package).path
    from coremltools.models.compute_plan import MLComputePlan

    with TemporaryDirectory() as folder:
        compiled = ct.models.utils.compile_model(str(package), str(Path(folder) / f"{package.stem}.mlmodelc"))
        plan = MLComputePlan.load_from_path(compiled, compute_units=ct.ComputeUnit.CPU_AND_NE)
        return list(list_placements(plan))


def list_placements(plan: Any) -> Iterator[Placement]:
    """List the operations of a coremltools MLComputePlan, constants left out."""
    for name, function in sorted(plan.model_structure.program.functions.items()):
        for operation in function.block.operations:
            if operation.operator_name.startswith(CONSTANT):
                continue
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
            yield Placement(
                function=name,
                operator=operation.operator_name,
                output=operation.outputs[0].name if operation.outputs else "",
                device=UNKNOWN if usage is None else _device(usage.preferred_compute_device),
                supported=() if usage is None else tuple(map(_device, usage.supported_compute_devices)),
                cost=None if cost is None else float(cost.weight),
            )


def count_by_device(placements: Sequence[Placement]) -> dict[str, int]:
    """Count the operations that each device has."""
    return dict(Counter(placement.device for placement in placements))


def _device(device: Any) -> str:
    return DEVICES.get(type(device).__name__, UNKNOWN)
