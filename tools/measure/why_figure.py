"""docs/why.svg: what one table per tensor costs in quality, and what it saves in time, in one figure.

    python tools/measure/why_figure.py

Quality is drawn from docs/measured/quality.json, which `compare_quality.py` measured. The two times are
Apple's. Bars of what the Neural Engine does not run, or runs slowly, are hatched and outlined: colour tells
nothing alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any

from measured import DOCS, RESULTS

FAST, OURS, SLOW = "fast", "ours", "slow"
"""How a bar looks."""

TABLE = (
    ("published int4: one absmax scale", "nearest, one scale", FAST),
    ("coremltools k-means per tensor", "k-means (coremltools)", FAST),
    ("coremltools sensitive k-means per tensor", "k-means by sensitivity (coremltools)", FAST),
    ("GPTQ, absmax scale per row", "GPTQ, one more scale for every row", FAST),
    ("lut, balanced scales: `w4-nearest`", "anequant w4-nearest, without calibration", OURS),
    ("**+ refinement: `w4-ane`**", "anequant w4-ane, the default", OURS),
)
GROUPS = (
    ("affine int4, groups of 32", "nearest", SLOW),
    ("HQQ int4, groups of 32", "HQQ", SLOW),
)
"""Rows of `compare_quality.py`, what they are called here, and how they look."""

APPLE = (("one table for the tensor", 14.8, FAST), ("a table for every channel", 59.0, SLOW))
"""Milliseconds a step of OPT-1.3B at 4 bits on the Neural Engine of an iPhone 15 Pro:
https://apple.github.io/coremltools/docs-guides/source/opt-opt1_3.html"""

WIDTH, MARGIN, LONGEST = 400, 16, 300
"""Units of the viewBox: all, the margin, and the longest bar, which leaves room for its number."""

SHOWN = 480
"""Pixels across, where there is room."""

LINE, BAR, GAP = 18, 12, 14

STYLE = """text{font:13.5px system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif;fill:#1f2328}
.title{font-size:18px;font-weight:700}.head{font-size:15px}.head,.ours{font-weight:700}.key{font-style:italic}.small{font-size:12px;fill:#57606a}
rect.fast{fill:#6e7781}rect.ours{fill:#0550ae}rect.slow{fill:url(#hatched);stroke:#953800}"""

HATCHED = (
    '<pattern id="hatched" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="5" height="5" fill="#fff"/><rect width="2" height="5" fill="#953800"/></pattern>'
)

Piece = tuple[float, Callable[[float], str]]
"""How high a piece of the figure is, and its markup for where it begins."""


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    number: str
    look: str


def figure(results: dict[str, Any]) -> str:
    """The SVG; `results` is the content of docs/measured/quality.json."""
    runs, settings, machine = results["runs"], results["settings"], results["machine"]
    table, groups = _losses(TABLE, runs), _losses(GROUPS, runs)
    times = [Bar(label, time, f"{time:g} ms", look) for label, time, look in APPLE]
    worst = max(bar.value for bar in (*table, *groups))
    pieces = [
        _text("One lookup table per tensor:", "title", LINE + 6),
        _text("what it brings and what it costs", "title", LINE + 4),
        *_group("Time of one step on the Neural Engine"),
        *_bars(times, max(bar.value for bar in times)),
        *_group("Loss that rounding to 4 bits adds"),
        _text("nats a token more than unrounded; shorter is better", "small"),
        *_key("one table per tensor: the engine is fast", FAST),
        *_bars(table, worst),
        *_key("a scale for every 32 weights: not on the engine", SLOW),
        *_bars(groups, worst),
        _space(GAP),
        _text("Time: Apple's, OPT-1.3B in 4 bits, iPhone 15 Pro", "small"),
        _text("(coremltools guide, Palettization of OPT-1.3B).", "small"),
        _text(f"Loss: {settings['model']}, {machine['date']}, docs/results.md.", "small"),
    ]
    markup, top = [], float(MARGIN - 4)
    for height, draw in pieces:
        markup.append(draw(top))
        top += height
    bottom = top + MARGIN - 6
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom:g}" width="{SHOWN}"'
            f' height="{SHOWN * bottom / WIDTH:.0f}" role="img" aria-labelledby="title text">',
            '<title id="title">What one table per tensor costs and brings</title>',
            f'<desc id="text">{escape(_described(times, table, groups))}</desc>',
            f"<style>{STYLE}</style>",
            f"<defs>{HATCHED}</defs>",
            f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{bottom - 1:g}" rx="8" fill="#fff"'
            ' stroke="#d1d9e0"/>',
            *filter(None, markup),
            "</svg>\n",
        ]
    )


def _losses(rows: Sequence[tuple[str, str, str]], runs: list[dict[str, Any]]) -> list[Bar]:
    """Means over rotation seeds, as in the table of `compare_quality.py`."""
    bars = []
    for row, label, look in rows:
        loss = fmean(run["extra_nll"] for run in runs if run["row"] == row)
        bars.append(Bar(label, loss, f"{loss:.4f}", look))
    return bars


def _text(words: str, style: str, height: float = LINE - 1, left: float = MARGIN) -> Piece:
    return (
        height,
        lambda top: f'<text class="{style}" x="{left:g}" y="{top + height - 4:g}">{escape(words)}</text>',
    )


def _space(height: float) -> Piece:
    return height, lambda top: ""


def _group(words: str) -> list[Piece]:
    return [_space(GAP), _text(words, "head")]


def _key(words: str, look: str) -> list[Piece]:
    """How bars look, and what that means."""

    def mark(top: float) -> str:
        return f'<rect class="{look}" x="{MARGIN}" y="{top + 4:g}" width="{BAR}" height="{BAR}"/>'

    return [_space(6), (0, mark), _text(words, "key", left=MARGIN + BAR + 6), _space(2)]


def _bars(bars: Sequence[Bar], longest: float) -> list[Piece]:
    """Each a line of words, and below it the bar with its number."""
    pieces = []
    for bar in bars:
        pieces += [_text(bar.label, bar.look), (BAR + 6, _drawn(bar, LONGEST * bar.value / longest))]
    return pieces


def _drawn(bar: Bar, long: float) -> Callable[[float], str]:
    return lambda top: (
        f'<rect class="{bar.look}" x="{MARGIN}" y="{top:g}" width="{long:.1f}" height="{BAR}"/>'
        f'<text class="{bar.look}" x="{MARGIN + long + 6:.1f}" y="{top + BAR - 1.5:g}">{bar.number}</text>'
    )


def _described(times: Sequence[Bar], table: Sequence[Bar], groups: Sequence[Bar]) -> str:
    """All that is drawn, for whoever has it read aloud."""
    parts = {
        "Time of one step on the Neural Engine": times,
        "Extra loss in nats a token with one table per tensor": table,
        "With a scale for every 32 weights, which do not run on the engine": groups,
    }
    said = (", ".join(f"{bar.label} {bar.number}" for bar in bars) for bars in parts.values())
    return " ".join(f"{head}: {text}." for head, text in zip(parts, said, strict=True))


def main() -> None:
    results = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
    (DOCS / "why.svg").write_text(figure(results), encoding="utf-8")


if __name__ == "__main__":
    main()
