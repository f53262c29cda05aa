"""From a float model to verified packages and a sentence, in Python.

    python examples/quantize_and_verify.py OUT

The model is the tiny one that comes with anequant; put a folder or a hub id in the place of None.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

import anequant

PROMPT = "In the morning they went down to the"


def main(output: Path) -> None:
    # Rotate, quantize and lower. Every key of a recipe can be given beside it, as on the command line.
    result = anequant.convert(None, output, recipe="w4-nearest", head_bits=6, context=64, batch=16)
    print(f"{result.quantized.rounding.bits_per_weight:.2f} bits per weight")
    if result.quality is not None:
        print(f"perplexity {result.quality.perplexity:.2f}, KL {result.quality.kl:.4f} from the float model")
    worst = max(result.quantized.rounding.tensors, key=lambda tensor: tensor.relative_error)
    print(f"worst weight: {worst.name}, off by {worst.relative_error:.1%}")

    # Read everything back, as anyone can who has the output alone.
    checked = anequant.verify(output)
    assert checked.packages is not None
    print(f"{checked.packages.weights} weights in the packages equal the checkpoint's, bit for bit")

    # The checkpoint is an ordinary transformers model.
    checkpoint = output / "checkpoint"
    model = anequant.load(checkpoint, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(PROMPT, return_tensors="pt")
    continued = model.generate(**tokens, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(continued[0]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("name the folder to write: python examples/quantize_and_verify.py OUT")
    main(Path(sys.argv[1]))
