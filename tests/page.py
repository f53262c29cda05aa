"""Pages as elements and texts, and what a browser finds wrong with how they look."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from browser import Page

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Tree(HTMLParser):
    """Elements in order as (tag, attributes, ancestors), and the text in each, by its place."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], tuple[int, ...]]] = []
        self.texts: dict[int, str] = {}
        self._open: list[int] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes), tuple(self._open)))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes), tuple(self._open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open[-1]][0] == tag, f"</{tag}> closes {self.elements[self._open[-1]]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for place in self._open:
            self.texts[place] = self.texts.get(place, "") + data

    def named(self, *tags: str) -> list[tuple[int, dict[str, str | None]]]:
        return [(place, item[1]) for place, item in enumerate(self.elements) if item[0] in tags]

    def inside(self, place: int, tag: str) -> list[int]:
        return [number for number, item in enumerate(self.elements) if item[0] == tag and place in item[2]]


WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


OUTSIDE = """[...document.querySelectorAll('body *')]
    .filter(e => !e.closest(".scroll, svg") && e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 80))"""


HIDDEN = """[...document.querySelectorAll('section, h2')]
    .filter(e => e.getBoundingClientRect().height < 10).map(e => e.outerHTML.slice(0, 80))"""


SMALL = """[...document.querySelectorAll('svg text')]
    .filter(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a < 10).length"""


def violations(page: Page, axe: str) -> list[dict[str, Any]]:
    page.evaluate(axe + ";0")
    found: list[dict[str, Any]] = page.evaluate(
        "axe.run().then(r => r.violations.map(v => ({id: v.id, impact: v.impact, "
        "nodes: v.nodes.slice(0, 3).map(n => n.html + ' ' + n.failureSummary)})))"
    )
    return [item for item in found if item["impact"] in ("serious", "critical")]
