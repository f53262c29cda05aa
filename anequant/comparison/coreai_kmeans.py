"""coreai-opt's own palettization of a torch model, to compare with: k-means with 16 entries a table.

A weight has one table, or one for every so many of its rows, as in the recipes for iOS of Apple's
coreai-models. Bars, log lines and warnings are dropped.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from anequant.errors import UnsupportedError

PACKAGE = "coreai-opt"
OLDEST_PYTHON = (3, 11)
BITS = 4
KEPT = ("lm_head", "model.embed_tokens")
TRACED = 8
"""Tokens of the pass in which the package finds the linears."""


def find_problem() -> str | None:
    """Say what the package needs and this machine lacks; None where there is nothing. It is not imported."""
    if sys.version_info < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        return f"{PACKAGE} needs Python {needed} or newer, this is {platform.python_version()}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"{PACKAGE} compiles its k-means, and there is no '{compiler}': install a C++ compiler"
    return None


def palettize_with_coreai(model: Any, *, rows: int | None = None, windows: Tensor | None = None) -> Any:
    """KMeansPalettizer of coreai-opt on every linear of a transformers model in float32 but the head; the
    model with weights as their tables say, entries in float16.

    A table serves `rows` rows of a weight, or all of it where that is None. With token windows [n, length]
    k-means weighs every weight by the sum, over the windows, of its squared gradient of the loss. Raises
    UnsupportedError for a weight that the package leaves as it was.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in KEPT
    }
    with _quiet(), _scripts_on_path():
        from coreai_opt import ExportBackend
        from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig

        palettizer = KMeansPalettizer(model, KMeansPalettizerConfig.from_dict(_settings(rows)))
        palettizer.prepare((torch.zeros(1, TRACED, dtype=torch.int64),))
        for name, linear in linears.items():
            if not is_parametrized(linear, "weight"):
                tables = "one table" if rows is None else f"a table every {rows} rows"
                raise UnsupportedError(
                    f"{PACKAGE} does not palettize '{name}', {linear.weight.shape[0]} rows, with {tables}"
                )
        if windows is not None:
            _weigh(palettizer, model, windows)
        palettized = palettizer.finalize(backend=ExportBackend.Torch)
    with torch.no_grad():
        for linear in linears.values():
            linear.weight.copy_(linear.weight.half())
    return palettized


def _settings(rows: int | None) -> dict[str, Any]:
    """The package's form of what Apple's recipes say; without embedding and head."""
    tables: dict[str, Any] = {"type": "per_tensor"}
    if rows is not None:
        tables = {"type": "per_grouped_channel", "axis": 0, "group_size": rows}
    weight = {"n_bits": BITS, "granularity": tables}
    return {
        "kmeans_palettization_config": {
            "global_config": {"op_state_spec": {"weight": weight}},
            "module_name_configs": dict.fromkeys(KEPT),
        }
    }


def _weigh(palettizer: Any, model: Any, windows: Tensor) -> None:
    """Have k-means done again, weighted by the gradients of one window after the other."""
    with palettizer.calibration_mode(loss_fn=lambda output, _: output.loss) as calibration:
        for batch in windows[:, None]:
            calibration.step(model(input_ids=batch, labels=batch), batch)


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _scripts_on_path() -> Iterator[None]:
    """Let torch find the environment's own `ninja`, which compiles, also where none is activated."""
    import ninja

    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, before))
    try:
        yield
    finally:
        os.environ["PATH"] = before
