"""Calibrated rounding beside gptqmodel's GPTQ: same random model, tokens and processor, one after the other.

    python tools/measure/bench_gptq.py

gptqmodel has requirements of its own, so it runs in an environment of its own, see `peer_environments.py`.

Both read the model, round it to 4 bits with second moments of the same windows, and write it; imports are not
timed. gptqmodel has a scale for every 128 columns of a row, `w4-ane` one codebook for the whole tensor.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bench_pipeline import LENGTH, RECIPES, TOKENS, WINDOWS, child
from measured import REPOSITORY, RESULTS, machine, when_and_where, write_json
from peer_environments import CACHE, GPTQMODEL, OwnPeer, make_environment, run_peer

RECIPE = RECIPES[0]


def measure(python: Path, shape: str, layers: int, work: Path) -> dict[str, Any]:
    model = work / f"{shape}-{layers}"
    child("model", model, work)
    for file in (REPOSITORY / "anequant" / "bundled" / "tiny-qwen2").glob("*token*.json"):
        shutil.copyfile(file, model / file.name)  # gptqmodel takes no model without
    ours = child(RECIPE, model, work)
    peer = OwnPeer(GPTQMODEL, "gptq_peer.py")
    return {
        "shape": shape,
        "layers": layers,
        "windows": WINDOWS,
        "length": LENGTH,
        "ours": {"seconds": ours["seconds"], "peak": ours["peak"]},
        "gptqmodel": run_peer(python, peer, model, work / TOKENS, work / "peer"),
        "machine": machine(),
    }


def sentences(measured: dict[str, Any]) -> str:
    ours, peer = measured["ours"], measured["gptqmodel"]
    return (
        f"{measured['layers']} layers of {measured['shape']}'s shape, {measured['windows']} windows of "
        f"{measured['length']} tokens, read to written: `{RECIPE}` {ours['seconds']:.0f} s and "
        f"{ours['peak'] / 1e9:.2f} GB, gptqmodel {peer['version']} (GPTQ, 4 bits, groups of {peer['group']}) "
        f"{peer['seconds']:.0f} s and {peer['peak'] / 1e9:.2f} GB: {peer['seconds'] / ours['seconds']:.1f} "
        f"times as long and {peer['peak'] / ours['peak']:.1f} times the memory. "
        f"{when_and_where(measured['machine'])}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="The folder of the peer's environment.")
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS / "gptq.json")
    options = parser.parse_args()
    python = make_environment(GPTQMODEL, options.cache)
    with tempfile.TemporaryDirectory() as work:
        measured = measure(python, options.shape, options.layers, Path(work))
    write_json(options.json, measured)
    print(sentences(measured))


if __name__ == "__main__":
    main()
