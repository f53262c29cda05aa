"""Where Core ML places every operation of a package, by its own plan; on a Mac."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anequant.targets.coreml.device import DevicePackage
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


def package_placements(package: Path) -> list[Placement]:
    """Compile a package and ask MLComputePlan for CPU and Neural Engine.

    Raises UnsupportedError anywhere but on macOS.
    """
    package = DevicePackage.open(package).path
    from coremltools.models.compute_plan import MLComputePlan

    with TemporaryDirectory() as folder:
        compiled = ct.models.utils.compile_model(str(package), str(Path(folder) / f"{package.stem}.mlmodelc"))
        plan = MLComputePlan.load_from_path(compiled, compute_units=ct.ComputeUnit.CPU_AND_NE)
        return list(plan_placements(plan))


def plan_placements(plan: Any) -> Iterator[Placement]:
    """The operations of a coremltools MLComputePlan, constants left out."""
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


def operations_by_device(placements: Sequence[Placement]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for placement in placements:
        counts[placement.device] += 1
    return dict(counts)


def _device(device: Any) -> str:
    return DEVICES.get(type(device).__name__, UNKNOWN)
