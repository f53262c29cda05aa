"""`anequant compare`: the numbers of quantize and eval, side by side; peers; and the page."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import asdict, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import browser
from page import HIDDEN, OUTSIDE, SMALL, WIDER, Tree, violations
from running import Ran, invoke, succeed
from scipy import stats
from terminal import on_terminal, rows

from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import BUNDLED_MODEL, SAMPLE_TEXT, Source
from anequant.checkpoints.stored_bits import StoredBits, measure_stored_bits
from anequant.cli import console, main
from anequant.comparison import compare as module
from anequant.comparison.paired import BETTER, UNDECIDED, WORSE
from anequant.comparison.peers import Peer, affine_groups
from anequant.comparison.trials import PEER, RECIPE, Comparison, Trial, mark_differences, mark_front
from anequant.evaluation.divergence import NoiseFloor
from anequant.evaluation.evaluate import evaluate_text
from anequant.evaluation.quality import WindowMeans, summarise
from anequant.jobs.output_folder import hash_files
from anequant.pipeline.quantize import quantize
from anequant.pipeline.steps import collect_tokens as kept
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe
from anequant.report.page.scatter import Point, draw_scatter
from anequant.report.terminal.tables import tabulate_comparison
from anequant.request import Request

SOURCE = Source(BUNDLED_MODEL, BUNDLED_MODEL.name)
SIZES = ("--windows", 2, "--length", 64)
RECIPES = ("w8-nearest", "w4-nearest")
PROJECTIONS = 4 * (2 * 192 * 192 + 2 * 64 * 192 + 3 * 576 * 192)
TABLES = 2 * 8192 * 192
ROWS_AND_COLUMNS = 4 * (2 * (192 + 192) + 2 * (64 + 192) + 3 * (576 + 192))


def run(*words: object) -> Ran:
    return invoke("compare", BUNDLED_MODEL, *words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def compared(place: Path) -> dict[str, Any]:
    """Two recipes that run and one that does not fit the model, with a page, the checkpoints kept."""
    (place / "wide.toml").write_text('rounding = "nearest"\nr1_block = 128\n')
    names = f"{','.join(RECIPES)},{place / 'wide.toml'}"
    result = run(
        *(
            "--recipes",
            names,
            *SIZES,
            "--html",
            place / "page.html",
            "-o",
            place / "kept",
            "--json",
            "--quiet",
        )
    )
    assert result.exit_code == 2, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def test_numbers_are_those_of_quantize_and_eval(
    compared: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    for trial, name in zip(compared["trials"], RECIPES, strict=False):
        assert (trial["name"], trial["kind"], trial["failed"]) == (name, "recipe", None)
        quantize(Request(SOURCE, load_recipe(name)), tmp_path / name)
        assert hash_files(place / "kept" / name) == hash_files(tmp_path / name)
        quality = evaluate_text(str(tmp_path / name), SAMPLE_TEXT, str(BUNDLED_MODEL), windows=2, length=64)
        assert trial["quality"] == quality.to_dict()
        bits = measure_stored_bits(open_checkpoint(tmp_path / name))
        assert bits is not None and trial["bits"] == asdict(bits)
        assert compared["base"]["nll"] == quality.base_nll
        assert trial["seconds"] > 0
    assert {path.name for path in (place / "kept").iterdir()} == set(RECIPES)


def test_bits_count_codebooks_and_scales(compared: dict[str, Any]) -> None:
    for trial, bits in zip(compared["trials"], (8, 4), strict=False):
        stored = bits * PROJECTIONS + 16 * (28 * 2**bits + ROWS_AND_COLUMNS)
        assert trial["bits"]["projections"] == pytest.approx(stored / PROJECTIONS, rel=1e-12)
        whole = stored + 16 * TABLES
        assert trial["bits"]["whole"] == pytest.approx(whole / (PROJECTIONS + TABLES), rel=1e-12)
        assert abs(trial["bits"]["nbytes"] - whole / 8) <= 1


def test_differences_are_paired_by_window(compared: dict[str, Any]) -> None:
    """Of two windows, which is what scipy's paired test takes; the page has the same words."""
    first, second, failed = compared["trials"]
    assert first["difference"] is failed["difference"] is None
    kls = [trial["quality"]["by_window"]["kl"] for trial in (second, first)]
    test = stats.ttest_rel(*kls)
    interval, told = test.confidence_interval(0.95), second["difference"]
    assert told["reference"] == "w8-nearest"
    assert told["kl"]["value"] == pytest.approx(second["quality"]["kl"] - first["quality"]["kl"], rel=1e-9)
    assert told["kl"]["value"] / told["kl"]["error"] == pytest.approx(test.statistic, rel=1e-9)
    assert told["kl"]["interval"] == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (told["verdict"] == WORSE) == (test.pvalue < 0.05)


def test_the_noise_floor_is_evals(compared: dict[str, Any], place: Path) -> None:
    words = ("--text", SAMPLE_TEXT, *SIZES, "--base", BUNDLED_MODEL)
    shown = succeed("eval", place / "kept" / "w8-nearest", *words, "--json", "--quiet").printed
    assert shown["noise_floor"] == compared["noise_floor"] and shown["noise_floor"]["windows"] == 2
    first = compared["trials"][0]
    assert shown["bits"] == first["bits"]
    assert {name: shown[name] for name in first["quality"]} == first["quality"]


def test_better_is_said_only_where_the_interval_excludes_zero() -> None:
    """40 windows on which one is a little better on average, by less and less against the spread."""
    draw = np.random.default_rng(2)
    hard, noise = draw.lognormal(-3.0, 0.3, 40), draw.normal(0, 0.004, 40)
    noise -= noise.mean()
    seen = []
    for shift in (-0.01, -0.002, -0.0005, 0.0, 0.0005, 0.002, 0.01):
        trials = [spread("first", hard), spread("other", hard + noise + shift)]
        reference, other = mark_differences(trials)
        assert reference.difference is None and other.difference is not None
        low, high = other.difference.kl.interval or (0, 0)
        assert (low < 0 < high) == (other.difference.verdict == UNDECIDED)
        seen.append(other.difference.verdict)
    assert seen == [BETTER, BETTER, UNDECIDED, UNDECIDED, UNDECIDED, WORSE, WORSE]
    one_window = mark_differences([spread("first", hard[:1]), spread("other", hard[:1] / 9)])
    assert one_window[1].difference is not None and one_window[1].difference.verdict == UNDECIDED


def test_nothing_is_compared_with_what_was_not_run() -> None:
    hard = np.linspace(0.1, 0.2, 5)
    broken = Trial("broken", RECIPE, True, failed="no")
    marked = mark_differences([broken, spread("other", hard)])
    assert [item.difference for item in marked] == [None, None]
    base = marked[1].quality
    assert base is not None
    noise = NoiseFloor(5, None, None, "the model overflows in float16")
    table = tabulate_comparison(Comparison("model", "text", 2, base, noise, None, marked))
    assert ("difference", "not told: 'broken', which others are compared with, was not run") in table.rows
    assert ("noise floor", "not measured: the model overflows in float16") in table.rows
    verdict = table.columns.index("verdict")
    assert [line[verdict] for line in table.lines] == ["–", "–"]


def test_what_fails_is_a_row(compared: dict[str, Any], place: Path) -> None:
    failed = compared["trials"][2]
    assert failed["name"] == "wide" and failed["quality"] is None and not failed["front"]
    assert "128" in failed["failed"] and failed["exit_code"] == 2
    assert "wide" in (place / "page.html").read_text() and failed["failed"][:20] in (
        place / "page.html"
    ).read_text().replace("&#39;", "'")


def test_tokens_are_collected_once_and_the_float_model_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for place, name in ((kept, "read_calibration_tokens"), (module, "record_reference")):
        own = getattr(place, name)

        def counted(*args: Any, own: Any = own, name: str = name, **options: Any) -> Any:
            calls.append(name)
            return own(*args, **options)

        monkeypatch.setattr(place, name, counted)
    static = "w_int8_a_int8_per_tensor_sym"
    recipes = {"one": load_recipe(static), "other": load_recipe(static, {"bits": 4})}
    calibration = Calibration(("self",), 2, 32)
    request = module.ComparisonRequest(SOURCE, recipes, calibration, windows=1, length=32)
    result = module.compare(request, tmp_path / "kept")
    assert sorted(calls) == ["read_calibration_tokens", "record_reference"]
    assert result.exit_code == 0 and result.calibration is not None
    quantize(Request(SOURCE, recipes["other"], calibration), tmp_path / "alone")
    assert hash_files(tmp_path / "alone") == hash_files(tmp_path / "kept" / "other")


def trial(name: str, bits: float, kl: float, on_ane: bool = True) -> Trial:
    return spread(name, (kl,), bits, on_ane)


def spread(name: str, kls: Any, bits: float = 4.0, on_ane: bool = True) -> Trial:
    """A trial whose windows have these KL."""
    several = tuple(map(float, kls))
    quality = summarise(torch.zeros(1, 2, dtype=torch.int64), [torch.zeros(2, 3)], [torch.zeros(2, 3)])
    by_window = WindowMeans(several, several, several, tuple(1.0 for _ in several))
    stored = StoredBits(bits, bits, 1)
    return Trial(name, RECIPE, on_ane, stored, replace(quality, by_window=by_window), 1.0)


def test_the_front_is_what_nothing_beats() -> None:
    points = [(4.0, 0.5), (4.0, 0.4), (4.0, 0.4), (5.0, 0.4), (6.0, 0.1), (8.0, 0.2), (9.0, 0.0)]
    expected = [False, True, True, False, True, False, True]
    trials = [trial(str(number), *point) for number, point in enumerate(points)]
    for order in itertools.islice(itertools.permutations(range(len(points))), 0, 5040, 97):
        marked = mark_front([trials[number] for number in order])
        assert [item.front for item in marked] == [expected[number] for number in order]
    best = trial("off", 1.0, 0.0, on_ane=False)
    broken = Trial("broken", PEER, True, failed="no")
    assert [item.front for item in mark_front([best, broken, trials[0]])] == [False, False, True]


def test_dots_and_labels_of_the_plot() -> None:
    points = [Point(str(n), "after", (4 + n / 50, 10.0 ** -(n % 5)), n < 3) for n in range(12)]
    drawn = draw_scatter(points)
    assert drawn is not None and draw_scatter([]) is None
    for one, other in itertools.pairwise(drawn.dots):
        assert one.x < other.x and (one.y < other.y) == (one.point.at[1] > other.point.at[1])
    assert drawn.path.count("L") == 2 and drawn.path.startswith(f"M{drawn.dots[0].x:g} {drawn.dots[0].y:g}")
    assert all(52 < dot.x < 332 and 10 <= dot.y <= 220 for dot in drawn.dots)
    same = draw_scatter([Point("10", "after", (4.0, 0.1), True), Point("11", "after", (4.0, 0.1), True)])
    assert same is not None
    first, second = same.dots
    assert (first.x, first.y) == (second.x, second.y)
    assert (first.label_x, first.label_y) != (second.label_x, second.label_y)


def test_peers_that_are_missing_or_break_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Path, output: Path) -> None:
        raise ZeroDivisionError("by zero\nand more")

    def none(rows: int, columns: int) -> int:
        return 0

    affine = partial(affine_groups, size=32)
    peers = (
        Peer("absent", affine, none, "no_such_package"),
        Peer("affine", affine, none, on_ane=False),
        Peer("broken", broken, none),
    )
    monkeypatch.setattr(module, "PEERS", peers)
    result = run("--recipes", "w4-nearest", *SIZES, "--peers", "--quiet", "--json")
    assert result.exit_code == 4
    ours, absent, affine, failed = json.loads(result.stdout)["trials"]
    assert ours["front"] and not affine["front"] and 0.02 < affine["quality"]["kl"] < 0.1
    whole = (4 * PROJECTIONS + 16 * TABLES) / (PROJECTIONS + TABLES)
    assert affine["bits"]["whole"] == pytest.approx(whole, rel=1e-12)
    assert (absent["failed"], absent["exit_code"]) == ("not installed: pip install no_such_package", 0)
    assert (failed["failed"], failed["exit_code"]) == ("ZeroDivisionError in 'broken': by zero", 4)


def said(trial: dict[str, Any]) -> str:
    """What a line tells of a trial of the result."""
    quality, bits = trial["quality"], trial["bits"]
    numbers = f"KL {quality['kl']:.4f}, extra NLL {quality['extra_nll']:+.4f}"
    return f"{numbers}, {bits['whole']:.2f} bits per weight"


def test_a_line_for_whatever_is_finished(tmp_path: Path) -> None:
    """Also for what takes no time, where there is no terminal and nothing else would be told so soon."""
    (tmp_path / "wide.toml").write_text('rounding = "nearest"\nr1_block = 128\n')
    result = run("--recipes", f"w4-nearest,{tmp_path / 'wide.toml'}", *SIZES, "--json")
    assert result.exit_code == 2
    values = json.loads(result.stdout)
    ours, wide = values["trials"]
    base, first, second = result.stderr.splitlines()
    tail = r"\d+\.\d s, \d+ MB, \d+% after 0:00:\d\d(, (estimating|about \d+ s left))?"
    assert re.fullmatch(rf"compare: float model, perplexity {values['base']['perplexity']:.3f}, {tail}", base)
    assert re.fullmatch(rf"compare: w4-nearest, {re.escape(said(ours))}, {tail}", first)
    assert f"{ours['seconds']:.1f} s" in first and "100%" in second
    assert re.fullmatch(rf"compare: wide, not run, {re.escape(wide['failed'])}, {tail}", second)


def test_quiet_tells_nothing() -> None:
    result = run("--recipes", "w4-nearest", *SIZES, "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("columns", [100, 50])
def test_lines_on_a_terminal(columns: int) -> None:
    words = ["compare", str(BUNDLED_MODEL), "--recipes", "w4-nearest", *map(str, SIZES), "--json"]
    code, written = on_terminal(columns, lambda: main(words))
    assert code == 0, written
    seen = [row for row in rows(written) if re.search(r"\d s +\d+ MB$", row)]
    assert [row.split("  ")[0] for row in seen] == ["float model", "w4-nearest"]
    assert len({len(row) for row in seen}) == 1 and len(seen[0]) <= columns
    assert re.search(r"  KL 0\.\d{4}", seen[1]) and ("bits per weight" in seen[1]) == (columns == 100)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--recipes", "w8-nearest,w4-nearst"), "unknown recipe 'w4-nearst'"),
        (("--recipes", "w8-nearest,w8-nearest"), "two recipes are called 'w8-nearest'"),
        (("--recipes", " , "), "names none"),
        (("--recipes", "w8-nearest", "--html", "no/such/folder/page.html"), "cannot be written"),
        (("--recipes", "w8-nearest", "--force"), "--force replaces"),
        (("--recipes", "w8-nearest", "--text", "no-such.txt"), "cannot be read"),
    ],
)
def test_mistakes_are_noticed_before_anything_runs(words: tuple[str, ...], what: str) -> None:
    result = run(*words)
    assert result.exit_code == 2 and what in result.stderr, result.stderr


def test_the_table_of_a_terminal() -> None:
    result = run("--recipes", "w_int4_per_tensor", *SIZES)
    assert result.exit_code == 0
    header, line, *rows = result.stdout.splitlines()
    assert header.split("\t")[:3] == ["recipe", "front", "bits/weight"]
    cells = dict(zip(header.split("\t"), line.split("\t"), strict=True))
    assert (cells["recipe"], cells["front"], cells["verdict"]) == ("w_int4_per_tensor", "*", "reference")
    assert re.fullmatch(r"[+-]0\.\d{4} ± 0\.\d{4}", cells["extra NLL"])
    assert re.fullmatch(r"0\.\d{4} ± 0\.\d{4}", cells["KL"])
    assert re.fullmatch(r"\d\d\.\d% ± \d+\.\d%", cells["top token"])
    named = [row.partition("  ")[0] for row in rows if not row.startswith(" ")]
    assert named == ["float model", "text", "noise floor", "peak memory", "KL of tokens"]


@pytest.mark.parametrize("width", [40, 60, 90, 120, 200])
def test_no_terminal_is_too_narrow_for_the_numbers(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    kls = 0.0347 + 0.0122 * 6**0.5 * np.array([-1, 0, 0, 1])
    own = replace(spread("a-recipe-of-my-own", kls), bits=StoredBits(4.06, 4.06, 1))
    trials = (own, Trial("broken", RECIPE, True, failed="no"))
    base = own.quality
    assert base is not None
    noise = NoiseFloor(1, 1e-6, 1.0, None)
    result = Comparison("model", "text", 2, base, noise, None, trials)
    console._draw(tabulate_comparison(result))
    shown = capsys.readouterr().out
    assert "…" not in shown and {"4.06", "0.0347", "+0.0000"} <= set(re.split(r"[\s,│]+", shown))
    assert "0.0122" in shown and "0.0%" in shown
    assert "a-recipe-of-my-own" in shown or width > 90
    assert ("━" in shown) == (width > 90)


def test_the_page_can_be_read(compared: dict[str, Any], place: Path) -> None:
    html = (place / "page.html").read_text(encoding="utf-8")
    tree = Tree()
    tree.feed(html)
    tree.close()
    assert tree.named("script", "img", "iframe") == [] and "http" not in html.replace("http-equiv", "")
    assert len(tree.named("tr")) >= 1 + 3 + 1 + 2
    assert f'<td class="n">{compared["trials"][1]["quality"]["kl_percentiles"]["p99"]:.4f}</td>' in html
    assert compared["trials"][1]["difference"]["verdict"] in html and "95% interval" in html
    axe_source = pytest.importorskip("axe_core_python", reason="needs axe-core-python, of the extra dev")
    axe = (resources.files(axe_source) / "axe.min.js").read_text(encoding="utf-8")
    with browser() as page:
        for width, dark in ((390, False), (1440, True)):
            page.open((place / "page.html").as_uri(), width=width, dark=dark)
            assert len(page.requests()) == 1 and page.complaints() == []
            assert page.evaluate(WIDER) == 0 and page.evaluate(OUTSIDE) == [] and page.evaluate(HIDDEN) == []
            assert page.evaluate(SMALL) == 0
            assert violations(page, axe) == []
