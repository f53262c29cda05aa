"""What `anequant eval` found, as rows of (label, text), and how means and their errors are written."""

from __future__ import annotations

import math

from anequant.evaluation.divergence import NoiseFloor
from anequant.evaluation.evaluate import Evaluation
from anequant.evaluation.intervals import Mean
from anequant.evaluation.quality import Percentiles, Quality
from anequant.evaluation.task_scores import TaskScores
from anequant.units import NOTHING

Rows = list[tuple[str, str]]
DECIMALS = 4
PERCENTILES = ("median", "90%", "99%", "99.9%", "maximum")
"""The columns of `list_percentiles`."""

SCORE, SCORE_ERROR = ",", "_stderr,"
"""What is between a metric and its filter in the names of lm-evaluation-harness."""


def describe_quality(result: Quality) -> Rows:
    """Return perplexity and, with a base, what differs from that and how KL is spread over predictions."""
    rows = [
        (
            "perplexity",
            f"{result.perplexity:.3f} (NLL {format_mean(result.nll_mean)}) on "
            f"{result.windows} windows, {result.tokens} tokens",
        )
    ]
    if result.kl_percentiles is not None:
        rows += [
            (
                "base",
                f"extra NLL {format_mean(result.extra_nll_mean, sign='+')}, "
                f"KL {format_mean(result.kl_mean)}, "
                f"same top token {format_share(result.top1_mean)}",
            ),
            ("KL of tokens", describe_percentiles(result.kl_percentiles)),
        ]
    return rows


def describe_percentiles(found: Percentiles) -> str:
    return ", ".join(
        f"{name} {text}" for name, text in zip(PERCENTILES, list_percentiles(found), strict=True)
    )


def list_percentiles(found: Percentiles) -> tuple[str, ...]:
    """Return the cells of PERCENTILES."""
    values = (found.median, found.p90, found.p99, found.p99_9, found.maximum)
    return tuple(format_divergence(value) for value in values)


def describe_noise(noise: NoiseFloor) -> tuple[str, str]:
    """Return what a float model differs from itself in float16, or why it is not known, as one row."""
    if noise.kl is None or noise.top1 is None:
        return "noise floor", f"not measured: {noise.missing}"
    return (
        "noise floor",
        f"KL {format_divergence(noise.kl)}, same top token {noise.top1:.1%}: the float model in float16, on "
        f"{noise.windows} windows",
    )


def describe_evaluation(result: Evaluation) -> Rows:
    rows = describe_quality(result.quality)
    if result.noise is not None:
        rows.append(describe_noise(result.noise))
    if result.bits is not None:
        bits = result.bits
        rows.append(
            (
                "size",
                f"{bits.whole:.2f} bits per weight with scales, codebooks, head and embedding, "
                f"{bits.projections:.2f} in the projections",
            )
        )
    if result.layers_missing is not None:
        rows.append(("layers", f"not compared: {result.layers_missing}"))
    if result.layers:
        worst = sorted(result.layers, key=lambda error: -error.relative_error)[:3]
        listed = ", ".join(f"{error.layer} ({error.relative_error:.2%})" for error in worst)
        rows.append(("layers", f"residual stream off most after layer {listed}"))
    return rows


def describe_tasks(result: TaskScores) -> Rows:
    """Return each task's scores, with the standard errors of those that the harness has one for."""
    rows = []
    for task, values in result.scores.items():
        listed = [
            f"{name.removesuffix(',none')} {_score(value, values.get(name.replace(SCORE, SCORE_ERROR)))}"
            for name, value in values.items()
            if SCORE_ERROR not in name
        ]
        rows.append((task, ", ".join(listed)))
    if result.shortened:
        rows.append(("shortened", f"{result.shortened} prompts lost their beginning to fit the context"))
    return rows


def _score(value: float | None, error: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def format_mean(mean: Mean | None, sign: str = "-") -> str:
    """Return a figure with its standard error, both to the same decimals: 0.0533 ± 0.0008; NOTHING for
    None. With `sign` + positive ones have one too."""
    if mean is None:
        return NOTHING
    decimals = _count_decimals(mean.error)
    error = "" if mean.error is None else f" ± {mean.error:.{decimals}f}"
    return f"{mean.value:{sign}.{decimals}f}{error}"


def format_share(mean: Mean | None) -> str:
    """Return a share in percent with its standard error: 85.2% ± 0.3%; NOTHING for None."""
    if mean is None:
        return NOTHING
    return f"{mean.value:.1%}" + ("" if mean.error is None else f" ± {mean.error:.1%}")


def format_divergence(value: float) -> str:
    """Return four decimals, or two digits and a power of ten where they would show hardly any."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def _count_decimals(error: float | None) -> int:
    """Return the decimals that show an error's first digit, at least DECIMALS."""
    if not error or not math.isfinite(error):
        return DECIMALS
    return max(DECIMALS, -math.floor(math.log10(error)))
