"""A model card as text: YAML front matter, then Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from anequant.checkpoints.license import FENCE

Rows = Sequence[tuple[str, str]]
SPECIAL = "|`<>[]*\\"


def card_page(
    metadata: Mapping[str, Any], title: str, said: Sequence[str], sections: Mapping[str, Sequence[str]]
) -> str:
    """Return a card: `said` are paragraphs, `sections` lines by heading."""
    front = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=1000).rstrip("\n")
    lines = [FENCE, front, FENCE, "", f"# {title}"]
    for paragraph in said:
        lines += ["", paragraph]
    for heading, body in sections.items():
        lines += ["", f"## {heading}", "", *body]
    return "\n".join(lines).rstrip("\n") + "\n"


def table(rows: Rows) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {label} | {plain(text)} |" for label, text in rows)]


def code(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def plain(text: str) -> str:
    """Escape a name that others chose, so that it stays text in Markdown."""
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return "".join(f"\\{char}" if char in SPECIAL else char for char in printable)
