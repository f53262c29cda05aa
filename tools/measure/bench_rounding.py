"""Rounding alone: gptq against a plain version, column by column, and Lloyd-Max against the exact optimum.

    python tools/measure/bench_rounding.py --json docs/measured/rounding.json

The plain version is the same arithmetic in torch, one column after the other, each with one product over all
columns that follow; both have the same Cholesky factor, and their codes are compared. The exact optimum of a
codebook in one dimension is found by dynamic programming (`kmeans1d`, which comes with coremltools) on 65536
bins, and both codebooks are measured on the values themselves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# isort: off
from anequant.quantization.codebook import lloyd_max  # before torch: how its threads wait
from anequant.quantization.gptq import Factor, Grid, factorize, gptq

# isort: on
import torch
from coremltools._deps import _kmeans1d
from measured import RESULTS, machine, when_and_where, write_json
from torch import Tensor

ROWS, COLUMNS, ENTRIES = 4864, 896, 16
BINS = 65536


def plain_gptq(grid: Grid, factor: Factor) -> Tensor:
    """Codes uint8 [in, out]."""
    order, unit = factor.order, factor.lower / factor.lower.diagonal()
    target = grid.target[order]
    boundaries = (grid.codebook[1:] + grid.codebook[:-1]) / 2
    codes, error = torch.empty(target.shape, dtype=torch.uint8), torch.zeros_like(target)
    for column in range(len(target) - 1, -1, -1):
        wanted = target[column] + unit[column + 1 :, column] @ error[column + 1 :]
        chosen = torch.bucketize(wanted, boundaries)
        codes[column], error[column] = chosen, target[column] - grid.codebook[chosen]
    return codes[order.argsort()]


def exact_codebook(values: Tensor) -> Tensor:
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, BINS, low, high).double()
    centres = low + (high - low) * (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    used = counts > 0
    found = _kmeans1d.cluster(centres[used].numpy(), ENTRIES, weights=counts[used].numpy())
    return torch.tensor(sorted(found.centroids), dtype=torch.float32)


def distortion(values: Tensor, codebook: Tensor) -> float:
    boundaries = (codebook[1:] + codebook[:-1]) / 2
    return float((values - codebook[torch.bucketize(values, boundaries)]).double().square().mean())


def best_time(run: Callable[[], Any], times: int) -> tuple[float, Any]:
    run()
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - begun)
    return min(seconds), result


def measure() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8192, COLUMNS, generator=generator) @ (
        torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5 + torch.eye(COLUMNS)
    )
    target = torch.randn(COLUMNS, ROWS, generator=generator)
    codebook = lloyd_max(target, 4)
    grid, factor = Grid(target, torch.ones_like(target), codebook), factorize(inputs.T @ inputs / 8192, 0.2)
    ours, codes = best_time(lambda: gptq(grid, factor), 5)
    plain, expected = best_time(lambda: plain_gptq(grid, factor), 2)
    values = torch.randn(ROWS * COLUMNS, generator=generator) + torch.randn(
        ROWS * COLUMNS, generator=generator
    ).pow(3)
    seconds, fitted = best_time(lambda: lloyd_max(values, 4), 5)
    return {
        "gptq": {"seconds": ours, "plain": plain, "differing": float((codes != expected).double().mean())},
        "lloyd_max": {
            "values": values.numel(),
            "seconds": seconds,
            "over_optimum": distortion(values, fitted) / distortion(values, exact_codebook(values)) - 1,
        },
        "machine": machine(),
    }


def sentences(found: dict[str, Any]) -> str:
    """What docs/performance.md says of a run."""
    gptq, lloyd = found["gptq"], found["lloyd_max"]
    return (
        f"gptq of {ROWS} x {COLUMNS}: {gptq['seconds']:.2f} s, a plain version column by column "
        f"{gptq['plain']:.2f} s, {gptq['plain'] / gptq['seconds']:.1f} times as long; "
        f"{gptq['differing']:.1e} of the codes differ. Lloyd-Max of {lloyd['values'] / 1e6:.1f}M values: "
        f"{lloyd['seconds']:.2f} s, a squared error {lloyd['over_optimum']:.3%} above the exact optimum's. "
        f"{when_and_where(found['machine'])}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "rounding.json")
    options = parser.parse_args()
    found = measure()
    write_json(options.json, found)
    print(sentences(found))


if __name__ == "__main__":
    main()
