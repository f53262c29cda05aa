"""report.html from the data of report.json: one page that loads nothing and runs nothing.

The text of the page is in the template beside this module; here are its charts and its numbers' forms.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from anequant.recipe import Recipe
from anequant.report.page import charts
from anequant.report.page.charts import LineChart
from anequant.report.terminal.inspect_rows import describe_recipe
from anequant.report.terminal.inspect_words import describe_kind, group_by_kind
from anequant.units import NOTHING, format_bytes, format_duration

TEMPLATE = "report.html.jinja"
BEFORE, AFTER, WRITTEN = "before", "after", "written"


def fill_template(template: str, **values: Any) -> str:
    """Return a template beside this module, filled in."""
    environment = Environment(
        loader=PackageLoader("anequant.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": format_number,
        "percent": format_percent,
        "size": format_bytes,
        "duration": format_duration,
        "short": short_name,
        "shape": format_sizes,
        "form": lambda value, form: format_percent(value) if form == "percent" else format_number(value),
        "alike": join_alike,
        "bars": charts.draw_code_bars,
        "entropy": charts.entropy,
    }
    return environment.get_template(template).render(chart=charts, **values).strip() + "\n"


def render_report(data: dict[str, Any]) -> str:
    """Return the page for the data that `collect_report` returns."""
    layers: list[dict[str, Any]] = data["layers"]
    inputs = _by_projection(layers, "inputs", (BEFORE, AFTER), "kurtosis")
    groups = {names[0]: ", ".join(map(short_name, names)) for names in data["model"]["input_groups"]}
    return fill_template(
        TEMPLATE,
        data=data,
        missing=data["missing"],
        layers=layers,
        words=describe_recipe(data["recipe"]),
        projections=[item["name"] for item in layers[0]["projections"]],
        groups=groups,
        heat=charts.draw_heat_map(_table(layers, "output_error", WRITTEN)),
        errors=_by_projection(layers, "output_error", (BEFORE, AFTER, WRITTEN), percent=True),
        weights=_by_projection(layers, "weight", (BEFORE, AFTER), "kurtosis"),
        inputs={name: chart for name, chart in inputs.items() if name in groups},
        residual=_residual(data),
        findings=_grouped(data["lint"] or ()),
        asset=_asset(data),
        choices=_choices(data["recipe"]),
    )


def format_number(value: float | None) -> str:
    """Return three significant digits, thousands apart."""
    if value is None:
        return NOTHING
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.1e}"


def format_percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.1%}"


def short_name(projection: str) -> str:
    """Return q, k, v, o, gate, up or down."""
    return projection.rpartition(".")[2].removesuffix("_proj")


def format_sizes(sizes: Sequence[int | None]) -> str:
    return " × ".join("?" if part is None else str(part) for part in sizes) or "a number"


def join_alike(tensors: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighbours of one form whose names differ in a number at the end: the parts of a head."""
    groups: list[list[dict[str, Any]]] = []
    for tensor in tensors:
        form = [tensor["name"].rstrip(string.digits), tensor["dtype"], tensor["shape"]]
        last = groups[-1][-1] if groups else None
        if last and form == [last["name"].rstrip(string.digits), last["dtype"], last["shape"]]:
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
    names = [[group[0]["name"], group[-1]["name"]][: len(group)] for group in groups]
    return [{**group[0], "name": " to ".join(ends)} for group, ends in zip(groups, names, strict=True)]


def _table(layers: list[dict[str, Any]], key: str, side: str, part: str | None = None) -> list[charts.Values]:
    """Return a row of values for every layer, with a column for every projection."""

    def value(item: dict[str, Any]) -> float | None:
        found: Any = item[key][side]
        if found is None or (item["bits"] == 16 and key == "output_error"):
            return None
        number: float | None = found if part is None else found[part]
        return number

    return [[value(item) for item in layer["projections"]] for layer in layers]


def _by_projection(
    layers: list[dict[str, Any]],
    key: str,
    sides: Iterable[str],
    part: str | None = None,
    *,
    percent: bool = False,
) -> dict[str, LineChart]:
    """Return a chart over the layers for every projection that has values, by name."""
    tables = {side: _table(layers, key, side, part) for side in sides}
    found = {}
    for column, item in enumerate(layers[0]["projections"]):
        series = {side: [row[column] for row in table] for side, table in tables.items()}
        chart = charts.draw_line_chart(series, percent=percent)
        if chart is not None:
            found[item["name"]] = chart
    return found


def _asset(data: dict[str, Any]) -> dict[str, Any] | None:
    """The asset with its functions by kind, the last of each shown; reports of before had no asset."""
    found: dict[str, Any] | None = data.get("asset")
    if found is None:
        return None
    kinds = group_by_kind(found["functions"], lambda function: str(function["name"]))
    shown = [{**kind[-1], "name": describe_kind([function["name"] for function in kind])} for kind in kinds]
    return {**found, "kinds": shown, "checked": (data["verified"] or {}).get("asset")}


def _residual(data: dict[str, Any]) -> LineChart | None:
    if data["embedded"] is None:
        return None
    entries = [data["embedded"], *(layer["residual"] for layer in data["layers"])]
    return charts.draw_line_chart({side: [entry[side] for entry in entries] for side in (BEFORE, AFTER)})


def _grouped(findings: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group findings by severity and rule."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for finding in findings:
        groups.setdefault((finding["severity"], finding["rule"]), []).append(finding)
    return list(groups.values())


def _choices(recipe: dict[str, Any]) -> list[tuple[str, Any, str, bool]]:
    """Return key, value, meaning, and whether the value is not the default."""
    fields = {item.name: item for item in dataclasses.fields(Recipe)}
    return [
        (key, recipe[key], field.metadata["help"].replace("`", ""), recipe[key] != field.default)
        for key, field in fields.items()
        if key in recipe
    ]
