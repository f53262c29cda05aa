"""What the README says of the model that quality is measured on, as docs/measured/model.json.

    python tools/measure/model_facts.py MODEL TEXT

Its parameters; its perplexity on the windows that `compare_quality.py` takes; the layer before which the
residual stream is loudest: its largest magnitude, and its root mean square without the first position, which
is where massive activations are; and by how much folding and rotation move the logits, for three seeds of
every R1.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from measured import RESULTS, machine, write_json
from torch import Tensor

from anequant.architectures.spec import EMBEDDING
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import Source
from anequant.evaluation.divergence import measure_quality
from anequant.evaluation.evaluate import read_windows
from anequant.pipeline.rotate import rotate
from anequant.recipe_files import load_recipe
from anequant.reference.forward import ReferenceModel
from anequant.request import Request

WINDOWS, LENGTH = 32, 512
ROTATIONS, SEEDS = ("block-hadamard", "hadamard", "random"), (0, 1, 2)


def loudest(checkpoint: Checkpoint, tokens: Tensor) -> dict[str, float]:
    model = ReferenceModel(checkpoint.spec, torch.float32, checkpoint.online)
    hidden = checkpoint.read(f"{EMBEDDING}.weight")[tokens].float()
    found = []
    for layer in range(checkpoint.spec.num_layers):
        rms = hidden[:, 1:].square().mean().sqrt()
        found.append({"layer": layer, "peak": float(hidden.abs().max()), "rms_elsewhere": float(rms)})
        with torch.no_grad():
            hidden = model.run_layer(layer, checkpoint.layer(layer), hidden)
    return max(found, key=lambda stream: stream["peak"])


def moved(folder: Path) -> list[dict[str, Any]]:
    """The largest change of a logit over the largest logit, in float64, for each rotation."""
    found = []
    for r1 in ROTATIONS:
        for seed in SEEDS:
            recipe = load_recipe("w4-nearest", {"r1": r1, "seed": seed})
            with tempfile.TemporaryDirectory() as work:
                result = rotate(Request(Source(folder, folder.name), recipe), Path(work) / "rotated")
            found.append({"r1": r1, "seed": seed, "moved": result.equivalence})
    return found


def facts(folder: Path, text: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(folder)
    spec = checkpoint.spec
    shapes = [*spec.outer_tensors().values(), *spec.num_layers * [*spec.layer_tensors().values()]]
    tokens = read_windows(checkpoint, text, WINDOWS, LENGTH)
    return {
        "model": folder.name,
        "text": text.name,
        "parameters": sum(map(math.prod, shapes)),
        "perplexity": measure_quality(checkpoint, tokens).perplexity,
        "stream": loudest(checkpoint, tokens),
        "rotations": moved(folder),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--json", type=Path, default=RESULTS / "model.json")
    arguments = parser.parse_args()
    write_json(arguments.json, facts(arguments.model, arguments.text))


if __name__ == "__main__":
    main()
