"""What `real_model_quality.py` measures: its rows, the curve through them, and the pairs to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from quality_runs import Row, is_available
from real_model_runs import SAMPLES

SEEDS = (0, 1, 2)
CALIBRATED = partial(Row, windows=SAMPLES)
TABLES = {"head_bits": 6, "embedding_bits": 8}
CHOSEN_TABLES = {"head_bits": 0, "embedding_bits": 0}

W4, TUNED, NEAREST = "**`w4-ane`**", "**`w4-ane --tune 60min`**", "`w4-nearest`"
AFFINE, GPTQ = "affine int4, groups of 32", "GPTQModel int4, groups of 128"


def peer(name: str, shows: str, needs: str | None = None) -> Row:
    return CALIBRATED(name, shows, peer=name, needs=needs)


def mixed(target: float, shows: str = "2 to 8 bits by what each costs", **overrides: int) -> Row:
    """A row whose widths are chosen, so many bits on average."""
    options = "".join(f" --{key.replace('_', '-')} {value}" for key, value in overrides.items())
    label = f"`w4-ane --target-bits {target:g}{options}`"
    return CALIBRATED(label, shows, overrides={"target_bits": target, **overrides})


ROWS = [
    CALIBRATED(NEAREST, "the best without calibration", "w4-nearest", seeds=SEEDS),
    CALIBRATED(W4, "the default recipe", seeds=SEEDS),
    CALIBRATED(
        "`w4-ane`, tokens weighed alike", "`--hessian layer`", overrides={"hessian": "layer"}, seeds=SEEDS
    ),
    Row("`w4-ane`, 48 windows", "the default number of windows", windows=48, seeds=SEEDS),
    Row("`w4-ane`, calibrated on `self`", "no text at hand", windows=48, own_text=True, seeds=SEEDS),
    CALIBRATED(TUNED, "distilled for an hour", overrides={"tune_minutes": 60}, seeds=SEEDS),
    CALIBRATED("`w4-ane`, head 6 and embedding 8 bits", "smaller tables", overrides=TABLES, seeds=SEEDS),
    *(mixed(target) for target in (2.5, 3.0, 3.5, 4.5, 5.0)),
    mixed(4.5, "head and embedding too", **CHOSEN_TABLES),
    CALIBRATED("`w6-ane`", "nearly as good as float", "w6-ane", seeds=SEEDS),
    mixed(6.0),
    CALIBRATED("`w8-ane`", "as good as float", "w8-ane", seeds=SEEDS),
    peer("coremltools k-means", "today's palettization, rotated"),
    peer("coremltools k-means, row scales", "the same, a scale for every row"),
    peer(AFFINE, "nearest"),
    peer("affine int4, groups of 64", "nearest"),
    peer("torchao int4, groups of 32", "nearest, zero points of 8 bits", "torchao"),
    peer("torchao int4, groups of 64", "nearest, zero points of 8 bits", "torchao"),
    peer("HQQ int4, groups of 32", "zero points of 16 bits", "hqq"),
    peer("HQQ int4, groups of 64", "zero points of 16 bits", "hqq"),
    peer(GPTQ, "calibrated on the same windows"),
    peer("llama.cpp Q4_0", "its file as it is, no importance matrix"),
    peer("llama.cpp Q4_0, head and embedding fp16", "as the other rows have them"),
    peer("llama.cpp Q4_K_M", "the same file; rows of 576 do not fit its blocks of 256"),
    peer("llama.cpp Q4_K_M, head and embedding fp16", "as the other rows have them"),
]

CURVE = (W4, "`w6-ane`", "`w8-ane`", *(row.label for row in ROWS if "target_bits" in row.overrides))
"""What the curve of KL against bits is drawn through."""

PAIRS = (
    (TUNED, GPTQ),
    (W4, GPTQ),
    (TUNED, AFFINE),
    (W4, AFFINE),
    (TUNED, "HQQ int4, groups of 32"),
    (TUNED, "llama.cpp Q4_K_M, head and embedding fp16"),
)
"""Ways whose difference in KL is told in words, ours first."""


def choose_rows(words: Sequence[str]) -> list[Row]:
    """Return the rows whose label has one of the words, in the order of the words."""
    rows = [row for row in ROWS if any(word in row.label for word in words)]
    return sorted(rows, key=lambda row: [word in row.label for word in words].index(True))


def list_unavailable(rows: Sequence[Row], done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List a run that failed for every row that is not done and whose package is not installed."""
    known = {run["row"] for run in done}
    return [
        {"row": row.label, "seed": row.seeds[0], "failed": f"`{row.needs}` is not installed"}
        for row in rows
        if not is_available(row) and row.label not in known
    ]
