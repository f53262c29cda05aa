"""The peers of `compare_quality.py` by name: those of anequant, and one that needs text to calibrate on.

Each takes a float model folder, the folder to write and token windows [n, length].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from anequant.comparison import peers

Run = Callable[[Path, Path, Tensor], None]


def _without_windows(run: Callable[[Path, Path], None]) -> Run:
    return lambda model, output, windows: run(model, output)


PEERS: dict[str, Run] = {
    "affine_groups": _without_windows(peers.affine_groups),
    "hqq_groups": _without_windows(peers.hqq_groups),
    "coremltools_kmeans": _without_windows(peers.coremltools_kmeans),
    "coremltools_sensitive_kmeans": peers.coremltools_sensitive_kmeans,
}
