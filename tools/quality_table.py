"""Quality of the recipes on one model and one text, as a Markdown table.

    python tools/quality_table.py MODEL TEXT [--windows 32] [--length 512]

Extra NLL and KL (nats) and the share of equal top tokens are against the float model, on evenly spaced
windows that start with the model's start token.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from pathlib import Path
from typing import Any

from anequant.checkpoints.source import resolve_source
from anequant.pipeline.evaluate import evaluate_text
from anequant.pipeline.quantize import quantize
from anequant.recipe import load_recipe

ROTATED = {"r1": "block-hadamard", "r2": "hadamard"}
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("published int8, one absmax scale", "w_int8_per_tensor", {}),
    ("published int4, one absmax scale", "w_int4_per_tensor", {}),
    ("the same, rotated (R1 in blocks of 64, R2)", "w_int4_per_tensor", ROTATED),
    ("4 bits, uniform codebook, balanced scales, rotated", "w4-nearest", {"codebook": "uniform"}),
    ("4 bits, lut, one scale per row, rotated", "w4-nearest", {"scales": "output"}),
    ("**4 bits, lut, balanced scales, rotated: `w4-nearest`**", "w4-nearest", {}),
    ("the same with R1 over the whole width", "w4-nearest", {"r1": "hadamard"}),
    ("the same without rotation", "w4-nearest", {"r1": "none", "r2": "none"}),
    ("8 bits, lut, balanced scales, rotated: `w8-nearest`", "w8-nearest", {}),
    ("`w4-nearest`, head 6 and embedding 8 bits", "w4-nearest", {"head_bits": 6, "embedding_bits": 8}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    source = resolve_source(options.model)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    print(
        f"`{source.name}`, {options.windows} windows of {options.length} of `{options.text.name}`, {today}\n"
    )
    print("| recipe | bits per weight | extra NLL | KL | same top token | seconds |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for number, (label, name, overrides) in enumerate(ROWS):
            output = Path(work) / str(number)
            begun = time.perf_counter()
            result = quantize(source, output, load_recipe(name, overrides))
            seconds = time.perf_counter() - begun
            quality = evaluate_text(
                str(output), options.text, options.model, windows=options.windows, length=options.length
            )
            print(
                f"| {label} | {result.bits_per_weight:.2f} | {quality.extra_nll:+.4f} | {quality.kl:.4f} "
                f"| {quality.top1:.1%} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
