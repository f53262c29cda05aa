"""Quality of ways to quantize the projections of one model, on one text, as a Markdown table.

    python tools/measure/compare_quality.py MODEL TEXT CALIBRATION [--json FILE] [--jobs 2]
        [--windows 32] [--length 512]

What is measured and how: see `quality_runs.py`. The rows that decide something run for three rotation seeds.
"""

from __future__ import annotations

from typing import Any

from quality_runs import Row, brief_table, run_table

SEEDS = (0, 1, 2)
PUBLISHED_ROTATED = {"r1": "block-hadamard", "r2": "hadamard"}
UNROTATED = {"r1": "none", "r2": "none"}
PLAIN_GPTQ = {"correction": 0.0, "descent": 0, "refinement": 0}


ROWS = [
    Row("published int4: one absmax scale", "a few outliers set the scale of all", "w_int4_per_tensor"),
    Row(
        "the same, R1 and R2",
        "rotation halves the damage, absmax still wastes the range",
        "w_int4_per_tensor",
        PUBLISHED_ROTATED,
    ),
    Row("published int8: one absmax scale", "at 8 bits even this is close", "w_int8_per_tensor"),
    Row(
        "int4, absmax scale per row",
        "output scales alone, unrotated",
        "w4-nearest",
        {**UNROTATED, "codebook": "uniform", "scales": "output"},
    ),
    Row("coremltools k-means per tensor", "today's palettization", peer="coremltools k-means"),
    Row(
        "coremltools sensitive k-means per tensor",
        "the same, weighted by Fisher information on the calibration text",
        peer="coremltools sensitive k-means",
        needs="sklearn",
    ),
    Row(
        "GPTQ, absmax scale per row",
        "classic GPTQ per channel, unrotated",
        overrides={**UNROTATED, **PLAIN_GPTQ, "codebook": "uniform", "scales": "output"},
    ),
    Row("affine int4, groups of 32", "nearest; leaves the ANE", peer="affine int4, groups of 32"),
    Row(
        "HQQ int4, groups of 32",
        "the package hqq; leaves the ANE",
        peer="HQQ int4, groups of 32",
        needs="hqq",
    ),
    Row("lut, no scales", "one Lloyd-Max codebook after rotation", "w4-nearest", {"scales": "tensor"}),
    Row("lut, scale per row", "one more vector", "w4-nearest", {"scales": "output"}),
    Row("lut, balanced scales: `w4-nearest`", "the best without calibration", "w4-nearest", seeds=SEEDS),
    Row("+ GPTQ", "error feedback on the codebook", overrides=PLAIN_GPTQ),
    Row("+ two passes of descent", "codes revisited", overrides={"correction": 0.0, "refinement": 0}),
    Row("+ half the target correction", "makes up for errors upstream", overrides={"refinement": 0}),
    Row("**+ refinement: `w4-ane`**", "codebook and scales refitted to the codes", seeds=SEEDS),
    Row("`w4-ane`, 48 windows", "the default number of windows", windows=48, seeds=SEEDS),
    Row(
        "`w4-ane`, calibrated on `self`",
        "no text at hand: the model's own samples",
        own_text=True,
        seeds=SEEDS,
    ),
    Row("`w4-ane`, R1 over the whole width", "against blocks of 64", overrides={"r1": "hadamard"}),
    Row("`w4-ane`, random orthogonal R1", "a Hadamard is no worse", overrides={"r1": "random"}),
    Row("`w4-ane`, no rotation", "what rotation brings", overrides=UNROTATED),
    Row(
        "`w4-ane --fold-input-scales`",
        "seven multiplications a layer fewer",
        overrides={"fold_input_scales": True},
    ),
    Row("`w4-ane --tune 100`", "distilled, codes and all", overrides={"tune": 100}, seeds=SEEDS),
    Row(
        "both",
        "tuning wins back what folding costs",
        overrides={"fold_input_scales": True, "tune": 100},
    ),
    Row("`w4-ane --target-bits 4.25`", "2 to 8 bits by what each costs", overrides={"target_bits": 4.25}),
    Row(
        "`w4-ane`, head 6 and embedding 8 bits",
        "nothing added",
        overrides={"head_bits": 6, "embedding_bits": 8},
        seeds=SEEDS,
    ),
    Row("`w4-ane`, head 4 bits", "GPTQ on the head too", overrides={"head_bits": 4}, seeds=SEEDS),
    Row("`w8-ane`", "as good as float", "w8-ane", seeds=SEEDS),
    Row("`w6-ane`", "nearly so", "w6-ane", seeds=SEEDS),
    Row("`w3-ane`", "where size decides", "w3-ane", seeds=SEEDS),
    Row("`w2-ane`", "too few for this model", "w2-ane"),
]

BRIEF = {
    "published int4: one absmax scale": "one absmax scale, not rotated",
    "coremltools sensitive k-means per tensor": "coremltools: one table, k-means by sensitivity",
    "GPTQ, absmax scale per row": "GPTQ: a scale for every row",
    "HQQ int4, groups of 32": "HQQ: a scale for every 32 weights",
    "**+ refinement: `w4-ane`**": "**anequant `w4-ane`: one table, scales, rotated**",
}
"""The rows that the README shows, and what it calls them."""


def brief(results: dict[str, Any]) -> str:
    return brief_table(BRIEF, results)


if __name__ == "__main__":
    run_table(ROWS, __doc__)
