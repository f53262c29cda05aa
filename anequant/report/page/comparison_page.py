"""The page of `anequant compare --html`: a plot of bits per weight against KL, and the table."""

from __future__ import annotations

from pathlib import Path

from anequant.comparison.trials import PEER, Comparison, Trial
from anequant.errors import UsageError
from anequant.report.page import scatter
from anequant.report.page.render import AFTER, BEFORE, WRITTEN, fill_template
from anequant.report.page.write_report import replace_file
from anequant.report.terminal.tables import Table, list_conditions, tabulate_spread

TEMPLATE = "compare.html.jinja"
RECIPE_MARK, PEER_MARK, OFF_MARK = AFTER, BEFORE, WRITTEN


def write_comparison_page(path: Path, result: Comparison, table: Table) -> None:
    """Write the page of a comparison, whose `table` is that of the terminal.

    Raises UsageError when the file cannot be written.
    """
    try:
        replace_file(path, render_comparison(result, table))
    except OSError as error:
        raise UsageError(f"page '{path}' cannot be written: {error.strerror}") from error


def render_comparison(result: Comparison, table: Table) -> str:
    points = [
        scatter.Point(str(number), choose_mark(trial), trial.point, trial.front)
        for number, trial in enumerate(result.trials, 1)
        if trial.point is not None
    ]
    kinds = {choose_mark(trial) for trial in result.trials if trial.point is not None}
    return fill_template(
        TEMPLATE,
        result=result,
        trials=result.trials,
        drawn=scatter.draw_scatter(points),
        kinds=[kind for kind in (RECIPE_MARK, PEER_MARK, OFF_MARK) if kind in kinds],
        mark=choose_mark,
        lines=table.lines,
        columns=table.columns,
        spread=tabulate_spread(result),
        first=result.trials[0].name,
        rows=list_conditions(result),
        plot=scatter,
    )


def choose_mark(trial: Trial) -> str:
    """Return the kind of a trial's mark: a circle, a square or a diamond."""
    if not trial.on_ane:
        return OFF_MARK
    return PEER_MARK if trial.kind == PEER else RECIPE_MARK
