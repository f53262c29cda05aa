"""A package run by Core ML itself, on a Mac: the counterpart of the interpreter's Package."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.targets.coreml.graph import package_graphs
from anequant.targets.coreml.signatures import FunctionSpec


class DevicePackage:
    """Loads each function when it is first run; the compute units are CPU and Neural Engine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._functions: dict[str | None, Any] = {}

    @classmethod
    def open(cls, path: Path) -> DevicePackage:
        """Raises UnsupportedError anywhere but on macOS."""
        if platform.system() != "Darwin":
            raise UnsupportedError(
                "Core ML runs on macOS only",
                remedy="use the interpreter or the transformers backend here",
            )
        return cls(path)

    @property
    def functions(self) -> dict[str, FunctionSpec]:
        """What the package's file declares, by name."""
        return {graph.function: graph.spec for graph in package_graphs(self.path)}

    def new_state(self) -> Any:
        """A state that all packages of a set share."""
        return self._function("prefill").make_state()

    def run(
        self, inputs: Mapping[str, Tensor], state: Any = None, function: str | None = None
    ) -> dict[str, Tensor]:
        """Outputs by name; the state changes in place."""
        arrays = {name: value.numpy() for name, value in inputs.items()}
        outputs = self._function(function).predict(arrays, state=state)
        return {name: torch.from_numpy(np.asarray(value)) for name, value in outputs.items()}

    def _function(self, name: str | None) -> Any:
        if name not in self._functions:
            from anequant.targets.coreml.toolkit import ct

            units = ct.ComputeUnit.CPU_AND_NE
            with _without_variables(self.path.absolute()) as path:
                self._functions[name] = ct.models.MLModel(path, compute_units=units, function_name=name)
        return self._functions[name]


@contextmanager
def _without_variables(path: Path) -> Iterator[str]:
    """The absolute path of a package, or of a link to it: coremltools expands variables in a path."""
    if "$" not in str(path):
        yield str(path)
        return
    with TemporaryDirectory() as folder:
        link = Path(folder) / "linked.mlpackage"
        link.symlink_to(path)
        yield str(link)
