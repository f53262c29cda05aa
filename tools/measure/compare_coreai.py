"""Quality of 4-bit weights as Apple's coreai-opt makes them for Core AI, and as anequant does, in one run.

    pip install 'anequant[peers]'
    python tools/measure/compare_coreai.py MODEL TEXT CALIBRATION [--json FILE] [--jobs 2]
        [--windows 32] [--length 512]

What is measured and how: see `quality_runs.py`. coreai-opt's k-means compiles itself on first use, by
a C++ compiler and `ninja`.
"""

from __future__ import annotations

from typing import Any

from quality_runs import Row, run_table, with_table

COREAI = "coreai_opt"
OURS = "**`w4-ane`**"
ROWS = [
    Row(
        "coreai-opt k-means per tensor",
        "Apple's palettization for Core AI",
        peer="coreai-opt k-means",
        needs=COREAI,
    ),
    Row(
        "coreai-opt sensitive k-means per tensor",
        "the same, weighted by squared gradients on the calibration text",
        peer="coreai-opt sensitive k-means",
        needs=COREAI,
    ),
    Row(
        "coreai-opt k-means, a table every 32 rows",
        "the default of Apple's exporter for LLMs on iOS",
        peer="coreai-opt k-means, a table every 32 rows",
        needs=COREAI,
    ),
    Row(
        "coreai-opt k-means, a table every 8 rows",
        "that exporter's finer recipe",
        peer="coreai-opt k-means, a table every 8 rows",
        needs=COREAI,
    ),
    Row("`w4-nearest`", "not calibrated", "w4-nearest"),
    Row(OURS, "the default recipe"),
]


def report(results: dict[str, Any]) -> str:
    """The table, and how far apart the best of either are in KL."""
    kl = {run["row"]: run["kl"] for run in results["runs"]}
    said = with_table(ROWS, results, "compare_coreai", "coreai_quality")
    theirs = [kl[row.label] for row in ROWS if row.needs == COREAI and row.label in kl]
    if not theirs or OURS not in kl:
        return said
    return f"{said}\n\nThe KL of `w4-ane` is {kl[OURS] / min(theirs):.2f} of the lowest of coreai-opt's."


if __name__ == "__main__":
    run_table(ROWS, __doc__)
