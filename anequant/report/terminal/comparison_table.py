"""A comparison of recipes as a table for a terminal, and as a page."""

from __future__ import annotations

from pathlib import Path

from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.comparison.trials import MEMORY_MISSING, PEER, Comparison, Trial
from anequant.errors import UsageError
from anequant.report.page import scatter
from anequant.report.page.html import NOTHING, page
from anequant.report.page.write import replace_file
from anequant.units import format_bytes

COLUMNS = (
    *("recipe", "front", "bits/weight", "projections", "size", "extra NLL", "KL", "top token", "seconds"),
)
TEMPLATE = "compare.html.jinja"
RECIPE_MARK, PEER_MARK, OFF_MARK = "after", "before", "written"
FRONT, OFF_ANE = "*", "off the ANE"


def lines(result: Comparison) -> list[tuple[str, ...]]:
    """A row for each trial, in the order of COLUMNS."""
    return [_line(trial) for trial in result.trials]


def _line(trial: Trial) -> tuple[str, ...]:
    front = FRONT if trial.front else "" if trial.on_ane else OFF_ANE
    bits, quality, seconds = trial.bits, trial.quality, trial.seconds
    if bits is None or quality is None or seconds is None:
        return (trial.name, front, *[NOTHING] * (len(COLUMNS) - 2))
    return (
        trial.name,
        front,
        f"{bits.whole:.2f}",
        f"{bits.projections:.2f}",
        format_bytes(bits.nbytes),
        f"{quality.extra_nll:+.4f}",
        f"{quality.kl:.4f}",
        f"{quality.top1:.1%}",
        f"{seconds:.1f}",
    )


def summary(result: Comparison) -> list[tuple[str, str]]:
    """What the numbers were measured on, and what is not among them."""
    base, seen = result.base, result.calibration
    rows = [
        ("float model", f"{result.model}, perplexity {base.perplexity:.3f}"),
        ("text", f"{base.windows} windows of {result.length} tokens of {result.text}"),
    ]
    if result.text == SAMPLE_TEXT.name:
        rows.append(("", "it is too short to rank recipes that are close: name a longer one with --text"))
    if seen is not None:
        rows.append(
            ("calibration", f"{seen['windows']} windows of {seen['length']} tokens of {seen['source']}")
        )
    rows.append(("peak memory", f"not told: {MEMORY_MISSING}"))
    return rows + [("not run", f"{trial.name}: {trial.failed}") for trial in result.trials if trial.failed]


def mark(trial: Trial) -> str:
    """The kind of a trial's mark: a circle, a square or a diamond."""
    if not trial.on_ane:
        return OFF_MARK
    return PEER_MARK if trial.kind == PEER else RECIPE_MARK


def render(result: Comparison) -> str:
    """The page: a plot of bits per weight against KL, and the table."""
    points = [
        scatter.Point(str(number), mark(trial), trial.point, trial.front)
        for number, trial in enumerate(result.trials, 1)
        if trial.point is not None
    ]
    kinds = {mark(trial) for trial in result.trials if trial.point is not None}
    return page(
        TEMPLATE,
        result=result,
        trials=result.trials,
        drawn=scatter.scatter(points),
        kinds=[kind for kind in (RECIPE_MARK, PEER_MARK, OFF_MARK) if kind in kinds],
        mark=mark,
        lines=lines(result),
        columns=COLUMNS,
        rows=summary(result),
        plot=scatter,
    )


def write_page(path: Path, result: Comparison) -> None:
    """Raises UsageError when the file cannot be written."""
    try:
        replace_file(path, render(result))
    except OSError as error:
        raise UsageError(f"page '{path}' cannot be written: {error.strerror}") from error
