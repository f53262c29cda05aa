"""What activations, the KV cache and online rotations cost in quality, as a Markdown table.

    python tools/measure/ablation.py MODEL TEXT CALIBRATION [--json FILE] [--jobs 2]
        [--windows 32] [--length 512]

What is measured and how: see `quality_runs.py`. W, A and KV are the bits of weights, of every projection's
input and of the cache; what is not named is float. Rotated rows have R1 in blocks of 64 and R2.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from quality_runs import Row, run_table

UNROTATED = {"r1": "none", "r2": "none"}
R4 = {"r4": "hadamard"}
PREFIX = {"activation_prefix": 1}
SMOOTH = {"smooth": 0.5}
STATIC = {"activation_bits": 8, "activation_scales": "static"}
DYNAMIC8 = {"activation_bits": 8}
DYNAMIC4 = {"activation_bits": 4}
ASYMMETRIC = {"activation_symmetric": False}
CLIP = {"activation_clip": 0.9}
KV4 = {"kv_bits": 4}
W4A4 = {"r1": "hadamard", **DYNAMIC4, **R4}
UNIFORM = {"codebook": "uniform"}
SEEDS_OF_R1, BEST_SEED, LEARNED, PCA = (
    f"W4A4 nearest, {how}" for how in ("eight seeds", "best of eight", "learned", "PCA")
)


def floats(label: str, shows: str, *parts: dict[str, Any]) -> Row:
    """A row with float weights."""
    return Row(label, shows, "w8-nearest", merged({"bits": 16}, *parts))


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


ROWS = [
    floats("A8 static, unrotated", "one scale per tensor dies of massive activations", UNROTATED, STATIC),
    floats("A8 static", "R1 and R2 do not help: the largest input is down_proj's", STATIC),
    floats(
        "A8 static, down_proj's input float",
        "which is the reason",
        STATIC,
        {"activation_overrides": "down_proj=16"},
    ),
    floats("A8 static, MSE", "a range of least squared error", STATIC, {"activation_range": "mse"}),
    floats("A8 static, percentile", "leaves out 1 in 100,000", STATIC, {"activation_range": "percentile"}),
    floats("A8 static, R4 in blocks of 64", "spreads them within blocks", STATIC, {"r4": "block-hadamard"}),
    floats("A8 static, R4", "spreads them over the whole width", STATIC, R4),
    floats("A8 static, R4, MSE", "the range matters no more", STATIC, R4, {"activation_range": "mse"}),
    floats("A8 static, SmoothQuant", "moves half of them into down_proj's weight", STATIC, SMOOTH),
    floats("A8 static, SmoothQuant 0.75", "more of them: float weights bear it", STATIC, {"smooth": 0.75}),
    floats("A8 static, prefix", "the first position stays float", STATIC, PREFIX),
    floats("A8 static, SmoothQuant, prefix", "", STATIC, SMOOTH, PREFIX),
    floats("A8 static, R4, prefix", "the best", STATIC, R4, PREFIX),
    floats("A8 static, R4, SmoothQuant, prefix", "nothing added", STATIC, R4, SMOOTH, PREFIX),
    floats("A8 dynamic", "a scale per token", DYNAMIC8),
    floats("A4 dynamic, unrotated", "4 bits need rotations", UNROTATED, DYNAMIC4),
    floats("A4 dynamic", "", DYNAMIC4),
    floats("A4 dynamic, R4 in blocks of 64", "", DYNAMIC4, {"r4": "block-hadamard"}),
    floats("A4 dynamic, R4", "R4 most of all", DYNAMIC4, R4),
    floats("A4 dynamic, R4, asymmetric", "one level more", DYNAMIC4, R4, ASYMMETRIC),
    floats("A4 dynamic, R4, clip 0.9", "a tenth of the range cut off", DYNAMIC4, R4, CLIP),
    floats("A4 dynamic, R4, asymmetric, clip 0.9", "both", DYNAMIC4, R4, ASYMMETRIC, CLIP),
    floats("KV8", "", {"kv_bits": 8}),
    floats("KV4, unrotated", "", UNROTATED, KV4),
    floats("KV4, R2", "", KV4),
    floats("KV4, R3", "", UNROTATED, KV4, {"r3": "hadamard"}),
    floats("KV4, R2 and R3", "R3 takes a fifth off the KL", KV4, {"r3": "hadamard"}),
    Row("W8A8 static, R4", "`w8a8-ane`", "w8-nearest", {**UNIFORM, **STATIC, **R4}),
    Row("W8A8 static, R4, prefix", "", "w8-nearest", {**UNIFORM, **STATIC, **R4, **PREFIX}),
    Row("W8A8 dynamic", "", "w8-nearest", {**UNIFORM, **DYNAMIC8}),
    Row("W4A8 static, R4", "`w4a8-ane`", "w4-ane", {**STATIC, **R4}),
    Row("W4A8 static, R4, prefix", "", "w4-ane", {**STATIC, **R4, **PREFIX}),
    Row("W4A8 dynamic", "", "w4-ane", DYNAMIC8),
    Row("W4A4 dynamic, R4", "", "w4-ane", {**DYNAMIC4, **R4}),
    Row("W4A4 dynamic, R4, asymmetric, clip 0.9", "", "w4-ane", {**DYNAMIC4, **R4, **ASYMMETRIC, **CLIP}),
    Row("W4A4KV4, R3, R4", "the whole QuaRot", "w4-ane", {**DYNAMIC4, **R4, **KV4, "r3": "hadamard"}),
    Row(SEEDS_OF_R1, "R1 over the whole width", "w4-nearest", W4A4, seeds=tuple(range(8))),
    Row(BEST_SEED, "`--restarts 8`: the least KL", "w4-nearest", {**W4A4, "restarts": 8}),
    Row(LEARNED, "`--learn 36` from seed 0", "w4-nearest", {**W4A4, "learn": 36}),
    Row(PCA, "`--r1 pca`", "w4-nearest", {**W4A4, "r1": "pca"}),
    *(
        Row(
            f"W4 in groups of {group}",
            "GPTQ on integers; leaves the ANE",
            "w4-ane",
            {**UNIFORM, "scales": "group", "group_size": group},
        )
        for group in (32, 64)
    ),
]


def learned_rotations(results: dict[str, Any]) -> str:
    """What a file's results say of seeds and of learned rotations, in words."""
    seeds = [run for run in results["runs"] if run["row"] == SEEDS_OF_R1]
    best, learned, pca = (
        next(run for run in results["runs"] if run["row"] == label) for label in (BEST_SEED, LEARNED, PCA)
    )
    first = next(run for run in seeds if run["seed"] == 0)

    def spread(key: str) -> str:
        values = [run[key] for run in seeds]
        return f"{min(values):.4f} to {max(values):.4f} (median {median(values):.4f})"

    def both(run: dict[str, Any]) -> str:
        return f"{run['extra_nll']:.4f} and {run['kl']:.4f}"

    return (
        f"What a learned rotation brings at W4A4 (nearest, R4): {len(seeds)} seeds cost "
        f"{spread('extra_nll')} NLL and {spread('kl')} KL. `--learn 36` takes seed 0 from {both(first)} "
        f"to {both(learned)} in {learned['seconds']:.0f} s. `--restarts {len(seeds)}`, which tries them all, "
        f"finds {both(best)} in {best['seconds']:.0f} s, and `--r1 pca` gives {both(pca)}."
    )


if __name__ == "__main__":
    run_table(ROWS, __doc__)
