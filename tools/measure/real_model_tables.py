"""What `real_model_quality.py` found, in tables and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from measured import when_and_where
from quality_runs import Row
from real_model_rows import CURVE, PAIRS, ROWS, W4

from anequant.evaluation.intervals import average, average_differences

TINY = 1e-3
"""Figures below have a digit more."""


def finished(results: Mapping[str, Any], label: str) -> list[dict[str, Any]]:
    """The runs of a row that did not fail."""
    return [run for run in results["runs"] if run["row"] == label and "failed" not in run]


def window_means(runs: Sequence[Mapping[str, Any]], text: str, key: str) -> list[float]:
    """A figure of every window, as the mean over seeds."""
    return [fmean(values) for values in zip(*(run["texts"][text][key] for run in runs), strict=True)]


def table(rows: Sequence[Row], results: Mapping[str, Any]) -> str:
    """The rows in their order, as Markdown; one that did not run tells why."""
    texts: list[str] = results["settings"]["texts"]
    heads = [f"{what}, {text}" for what in ("KL", "extra NLL", "same top token") for text in texts]
    names = ["way", "bits", "MB", "seeds", *heads, "seconds", "peak MB", "what it shows"]
    lines = [row_of(names), "|---|" + "---:|" * (len(names) - 2) + "---|"]
    for row in rows:
        runs = finished(results, row.label)
        if not runs:
            blank = [""] * (len(names) - 2)
            lines.append(row_of([row.label, *blank, f"not run: {reason(row, results)}"]))
            continue
        cells = [
            row.label,
            f"{fmean(run['bits'] for run in runs):.3f}",
            f"{fmean(run['nbytes'] for run in runs) / 1e6:.1f}",
            str(len(runs)),
            *(cell(runs, text, "kl", "{:.4f}") for text in texts),
            *(cell(runs, text, "extra_nll", "{:+.4f}") for text in texts),
            *(f"{fmean(window_means(runs, text, 'top1')):.1%}" for text in texts),
            f"{fmean(run['seconds'] for run in runs):.0f}{mark(runs, results)}",
            f"{fmean(run['peak'] for run in runs) / 1e6:.0f}",
            row.shows,
        ]
        lines.append(row_of(cells))
    return "\n".join(lines)


def mark(runs: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    """Stars that tell which machine the last of the runs was on, none for the first machine of all."""
    return "*" * list_places(results).index(when_and_where(runs[-1]["machine"]))


def list_places(results: Mapping[str, Any]) -> list[str]:
    """When and where runs were made, from the place of most of them on."""
    places = [when_and_where(run["machine"]) for run in results["runs"] if "failed" not in run]
    return sorted(dict.fromkeys(places), key=lambda place: -places.count(place))


def row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(runs: Sequence[Mapping[str, Any]], text: str, key: str, form: str) -> str:
    """A figure with its standard error, which a single window does not tell."""
    mean = average(window_means(runs, text, key))
    form = form.replace(".4f", ".5f") if 0 < abs(mean.value) < TINY else form
    error = "" if mean.error is None else f" ± {mean.error:{form[form.index('.') : -1]}}"
    return form.format(mean.value) + error


def curve(results: Mapping[str, Any]) -> str:
    """KL against bits and megabytes as Markdown, from the fewest bits on: chosen widths and single ones."""
    texts: list[str] = results["settings"]["texts"]
    heads = [
        "way",
        "bits",
        "MB",
        *(f"KL, {text}" for text in texts),
        *(f"of 4 bits, {text}" for text in texts),
    ]
    found = {label: runs for label in CURVE if (runs := finished(results, label))}
    lines = [row_of(heads), "|---|" + "---:|" * (len(heads) - 1)]
    for label, runs in sorted(found.items(), key=lambda item: fmean(run["bits"] for run in item[1])):
        means = {text: fmean(window_means(runs, text, "kl")) for text in texts}
        four = {text: fmean(window_means(found[W4], text, "kl")) for text in texts} if W4 in found else {}
        cells = [
            label,
            f"{fmean(run['bits'] for run in runs):.2f}",
            f"{fmean(run['nbytes'] for run in runs) / 1e6:.1f}",
            *(f"{means[text]:.{5 if means[text] < TINY else 4}f}" for text in texts),
            *(f"{means[text] / four[text]:.2f}" if four else "" for text in texts),
        ]
        lines.append(row_of(cells))
    return "\n".join(lines)


def reason(row: Row, results: Mapping[str, Any]) -> str:
    """Why a row has no figures, without what would end a cell of the table."""
    failures = [run["failed"] for run in results["runs"] if run["row"] == row.label and "failed" in run]
    if failures:
        return str(failures[-1]).replace("|", "/")
    return "not measured yet"


def compare_pair(ours: str, other: str, results: Mapping[str, Any]) -> str | None:
    """Tell the difference in KL between two rows, window by window; None where one of them has no run."""
    runs = finished(results, ours), finished(results, other)
    if not all(runs):
        return None
    said = []
    for text in results["settings"]["texts"]:
        found = average_differences(*(window_means(each, text, "kl") for each in runs))
        verdict = "better" if found.value < 0 else "worse"
        verdict = verdict if found.excludes_zero else "no different"
        said.append(f"{verdict} on {text} ({found.value:+.4f} ± {found.error:.4f})")
    bits = [fmean(run["bits"] for run in each) for each in runs]
    return f"{ours} at {bits[0]:.2f} bits, {other} at {bits[1]:.2f}: {' and '.join(said)}."


def tell_places(results: Mapping[str, Any]) -> str:
    """Say when and where: seconds compare within one place only."""
    first, *others = list_places(results)
    return "; ".join([first, *(f"rows with {'*' * n} {place}" for n, place in enumerate(others, 1))])


def report(results: Mapping[str, Any]) -> str:
    """The block of a page: what was measured and how, the table, and differences in words."""
    settings = results["settings"]
    pairs = [said for pair in PAIRS if (said := compare_pair(*pair, results)) is not None]
    texts, calibration = (" and ".join(settings[key]) for key in ("texts", "calibration"))
    return (
        f"`{settings['model']}` against itself in float, on {settings['windows']} windows of "
        f"{settings['length']} tokens of {texts} each; ± is the standard error over windows. What calibrates "
        f"sees {settings['samples']} windows, as many of {calibration} each. The model's own weights lie on "
        "the grid of Q4_1 in groups of 32, which a quantizer with such groups finds again: so every peer "
        "rounds its rotated twin (`anequant rotate`), never the model itself. Bits are those of projections "
        "with scales, zero points and codebooks, MB of the whole model with embedding and head, in fp16 "
        f"unless said. {tell_places(results)}, by `python "
        "tools/measure/real_model_quality.py`; the single runs are in "
        f"[measured/real_model.json](measured/real_model.json).\n\n{table(ROWS, results)}\n\n"
        f"KL against bits, widths chosen by what each tensor's rounding costs:\n\n{curve(results)}\n\n"
        "KL of two ways on the same windows; they differ where the 95% interval of that excludes 0:\n\n"
        + "\n".join(f"- {said}" for said in pairs)
    )
