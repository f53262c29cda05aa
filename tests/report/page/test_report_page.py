"""report.html: without a browser by reading it, and in a headless Chromium where there is one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from browser import Page, browser
from page import HIDDEN, OUTSIDE, SMALL, WIDER, Tree, violations

from anequant.checkpoints.source import BUNDLED_MODEL, Source
from anequant.jobs.control import Run
from anequant.lower_options import LowerOptions
from anequant.pipeline.convert import convert
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe
from anequant.report.page.charts import contrast
from anequant.report.page.conversion_report import Stopwatch
from anequant.report.page.write_report import write_report
from anequant.request import Request

SECTIONS = [
    *("summary", "where", "residual", "outliers", "layers", "packages", "asset", "recipe", "lint"),
    "environment",
]
WIDTHS = (390, 1440)
TEXT_PAIRS = [
    ("text", "page"),
    ("text", "panel"),
    ("soft", "page"),
    ("soft", "panel"),
    ("link", "page"),
]
MARK_PAIRS = [("before", "page"), ("after", "page"), ("written", "page"), ("warn", "panel")]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model converted, its head in 6 bits and R4 online, and its report."""
    folder = tmp_path_factory.mktemp("report") / "out"
    recipe = load_recipe("w4-nearest", {"r4": "block-hadamard", "head_bits": 6})
    watch = Stopwatch()
    source = Source(BUNDLED_MODEL, BUNDLED_MODEL.name)
    options = LowerOptions(context=16, batch=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anequant.pipeline.converting.SAMPLE_WINDOWS", 1)
        patch.setattr("anequant.pipeline.converting.SAMPLE_LENGTH", 64)
        convert(Request(source, recipe, Calibration(), lowering=options), folder, Run(finished=watch.add))
    write_report(folder, source, run=watch.result())
    return folder


@pytest.fixture(scope="module")
def html(output: Path) -> str:
    return (output / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(html: str) -> Tree:
    tree = Tree()
    tree.feed(html)
    tree.close()
    return tree


def test_nothing_is_loaded_and_nothing_runs(tree: Tree, html: str) -> None:
    assert tree.named("script", "iframe", "object", "embed", "img", "image", "video", "audio") == []
    for place, attributes in enumerate(item[1] for item in tree.elements):
        for key, value in attributes.items():
            assert not key.startswith("on"), tree.elements[place]
            if key in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert str(value).startswith("#") or value == "data:,", tree.elements[place]
    assert "url(" not in html and "@import" not in html and "http" not in html.replace("http-equiv", "")
    policy = next(item for _, item in tree.named("meta") if item.get("http-equiv"))
    assert str(policy["content"]).startswith("default-src 'none'")


def test_structure_for_those_who_do_not_see_it(tree: Tree) -> None:
    levels = [int(tree.elements[place][0][1]) for place, _ in tree.named("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    sections = tree.named("section")
    assert [attributes["id"] for _, attributes in sections] == SECTIONS
    ids = [attributes["id"] for _, attributes, _ in tree.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in tree.elements:
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids
        if (attributes.get("href") or "").startswith("#"):
            assert str(attributes["href"])[1:] in ids
    tables = tree.named("table")
    assert len(tables) >= 4 + 2 * 4
    for place, _ in tables:
        assert tree.inside(place, "caption")
        headers = [tree.elements[number][1].get("scope") for number in tree.inside(place, "th")]
        assert "col" in headers and "row" in headers and None not in headers
    drawn = [(place, item) for place, item in tree.named("svg") if item.get("aria-hidden") != "true"]
    assert len(drawn) > 20
    for place, attributes in drawn:
        assert attributes["role"] == "img" and attributes["aria-labelledby"]
        (title,) = tree.inside(place, "title")
        assert tree.texts[title].strip()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_can_be_told_apart(html: str, dark: bool) -> None:
    style = html[html.index("<style>") : html.index("</style>")]
    light_values, dark_values = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colors = dict(re.findall(r"--(\w+): (#\w{6})", dark_values if dark else light_values))
    for one, other in TEXT_PAIRS:
        assert contrast(colors[one], colors[other]) >= 4.5, (one, other)
    for one, other in MARK_PAIRS:
        assert contrast(colors[one], colors[other]) >= 3, (one, other)
    for fill, ink in re.findall(r'<rect[^>]* fill="(#\w{6})"/><text[^>]*fill: (#\w{6})', html):
        assert contrast(fill, ink) >= 4.5


def test_text_from_a_model_is_text(output: Path, tmp_path: Path) -> None:
    from anequant.checkpoints.reader import read_json
    from anequant.report.page.render import render_report

    data = read_json(output / "report.json")
    data["model"]["name"] = "<script>alert(1)</script>"
    data["lint"][0]["op"] = '"><img src=x onerror=alert(1)>'
    page = render_report(data)
    assert "<script" not in page and "<img" not in page


def test_the_template_is_in_the_package() -> None:
    assert (resources.files("anequant") / "report" / "page" / "report.html.jinja").is_file()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def axe() -> str:
    pytest.importorskip("axe_core_python", reason="needs axe-core-python, of the extra dev")
    return (resources.files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_in_chromium(page: Page, axe: str, output: Path, width: int, dark: bool) -> None:
    url = (output / "report.html").as_uri()
    page.open(url, width=width, dark=dark)
    assert page.requests() == [url] and page.complaints() == []
    assert page.evaluate("[...document.querySelectorAll('section')].map(s => s.id)") == SECTIONS
    assert page.evaluate("innerWidth") == width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 128 * 3) == dark
    for opened in (False, True):
        page.evaluate(
            f"for (const d of document.querySelectorAll('details')) d.open = {str(opened).lower()}; 0"
        )
        assert page.evaluate(WIDER) == 0
        assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(HIDDEN) == []
    assert page.evaluate(SMALL) == 0
    assert violations(page, axe) == []
    assert page.complaints() == []


def test_a_page_with_faults_is_noticed(page: Page, axe: str, html: str, tmp_path: Path) -> None:
    broken = html.replace("--soft: #505862", "--soft: #c0c0c0")
    broken = broken.replace(
        "</main>", '<img src="https://example.org/x.png"><p style="width: 900px">wide</p></main>'
    )
    path = tmp_path / "broken.html"
    path.write_text(broken, encoding="utf-8")
    page.open(path.as_uri(), width=390, dark=False)
    assert any("example.org" in text for text in page.complaints())
    assert page.evaluate(WIDER) > 0
    assert {"color-contrast", "image-alt"} <= {item["id"] for item in violations(page, axe)}
