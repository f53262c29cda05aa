"""What is seen of a job while it runs, on a terminal and elsewhere, and when it is interrupted; help and
completion."""

from __future__ import annotations

import json
import random
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest
from conftest import Quantized
from running import SCRIPT, execute, execute_python, invoke, succeed
from terminal import on_terminal, rows

from anequant import errors
from anequant.checkpoints.source import BUNDLED_MODEL
from anequant.cli import console, main
from anequant.cli import options as cli_options
from anequant.cli.live import Lines
from anequant.jobs.control import Expected, Unit, measure_shares
from anequant.jobs.estimate import Estimate
from anequant.pipeline import converting
from anequant.pipeline.steps import checks
from anequant.recipe_files import named_recipes
from anequant.report.page import conversion_report
from anequant.targets.coreml import build as lower_package
from anequant.units import format_time_left

SIZES = ("--context", "32", "--batch", "8")
NEAREST = ("--recipe", "w4-nearest")
LAYERS = 64
COLOUR = re.compile(r"\x1b\[[0-9;]*\b3[0-9]\b[0-9;]*m")
MEGABYTES = 256


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SHOW_AFTER", 0.0)
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)


# The estimate


def plan_of(weights: dict[str, tuple[str, float]]) -> list[Expected]:
    return [Expected(name, kind, weight) for name, (kind, weight) in weights.items()]


def even(count: int) -> list[Expected]:
    return [Expected(f"layer {number}", "layer", 3.0) for number in range(count)]


def work(estimate: Estimate, clock: Clock, units: Sequence[Expected], number: int, seconds: float) -> None:
    """Do one unit, with reports of its beginning and its end."""
    start, end = measure_shares(units)[units[number].name]
    estimate.reached(start)
    clock.now += seconds
    estimate.reached(end)


def test_nothing_is_told_until_enough_is_done(clock: Clock) -> None:
    estimate, units = Estimate(clock), even(40)
    assert estimate.left() is None
    estimate.plan(units)
    estimate.reached(0.0)
    clock.now += 100.0
    assert estimate.left() is None
    work(estimate, clock, units, 0, 7.0)
    assert estimate.left() is None, "1 of 40 units says little"
    work(estimate, clock, units, 1, 7.0)
    assert estimate.left() is not None


def test_units_of_one_kind_are_told_exactly(clock: Clock) -> None:
    estimate, units = Estimate(clock), even(10)
    estimate.plan(units)
    for number in range(10):
        work(estimate, clock, units, number, 7.0)
        assert estimate.left() == pytest.approx(7.0 * (9 - number))
        assert estimate.share == pytest.approx((number + 1) / 10)


def test_the_estimate_counts_down_and_never_below_the_units_to_come(clock: Clock) -> None:
    estimate, units = Estimate(clock), even(10)
    estimate.plan(units)
    for number in range(5):
        work(estimate, clock, units, number, 8.0)
    left = []
    for _ in range(7):
        clock.now += 3.0
        left.append(estimate.left())
    assert left == pytest.approx([37.0, 34.0, 32.0, 32.0, 32.0, 32.0, 32.0])


def test_a_plan_that_is_wrong_between_kinds_is_corrected(clock: Clock) -> None:
    """The plan takes sampling for most of the work; here a layer takes ten times what it says."""
    units = [Expected("tokens", "sample", 60.0), *even(20)]
    truth = [6.0] + [3.0] * 20
    estimate = Estimate(clock)
    estimate.plan(units)
    work(estimate, clock, units, 0, truth[0])
    assert format_time_left(estimate.left()) == "estimating", (
        "half of the work is of a kind that was never seen"
    )
    work(estimate, clock, units, 1, truth[1])
    assert estimate.left() == pytest.approx(3.0 * 19)
    for number in range(2, 21):
        work(estimate, clock, units, number, truth[number])
        assert estimate.left() == pytest.approx(3.0 * (20 - number))


@pytest.mark.parametrize("replaying", [0.0, 5.0])
def test_what_an_interrupted_run_did_is_no_speed(clock: Clock, replaying: float) -> None:
    """Reading over 12 of 20 units takes `replaying` seconds each; one of the others takes 30."""
    estimate, units = Estimate(clock), even(20)
    estimate.plan(units)
    for number in range(12):
        start, end = measure_shares(units)[units[number].name]
        estimate.reached(start)
        estimate.taken_over(end)
        clock.now += replaying
    assert estimate.share == pytest.approx(0.6)
    assert estimate.left() is None
    for number in range(12, 20):
        work(estimate, clock, units, number, 30.0)
        assert estimate.left() == pytest.approx(30.0 * (19 - number))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_told_is_near_the_truth(clock: Clock, seed: int) -> None:
    """Each kind takes 0.2 to 5 times what the plan says, each unit 0.9 to 1.1 times that. So once all kinds
    that are left were seen, what is told is at most 1.1 / 0.9 times the truth, and at least 0.9 / 1.1."""
    chance = random.Random(seed)
    units = [Expected("tokens", "sample", chance.uniform(5, 50))]
    units += [Expected(f"layer {number}", "layer", chance.uniform(1, 4)) for number in range(24)]
    units += [Expected(f"chunk {number}", "package", chance.uniform(1, 4)) for number in range(8)]
    factors = {kind: 5 ** chance.uniform(-1, 1) for kind in ("sample", "layer", "package")}
    seconds = [unit.weight * factors[unit.kind] * chance.uniform(0.9, 1.1) for unit in units]
    estimate = Estimate(clock)
    estimate.plan(units)
    checked = 0
    for number, unit in enumerate(units[:-1]):
        work(estimate, clock, units, number, seconds[number])
        seen = {done.kind for done in units[: number + 1]}
        left = estimate.left()
        if {other.kind for other in units[number + 1 :]} <= seen and left is not None:
            checked += 1
            assert 0.9 / 1.1 < left / sum(seconds[number + 1 :]) < 1.1 / 0.9, unit.name
    assert checked >= 7


def test_work_without_a_plan_is_taken_for_even(clock: Clock) -> None:
    estimate = Estimate(clock)
    for done in (0.0, 0.02, 0.04):
        estimate.reached(done)
        assert estimate.left() is None
        clock.now += 1.0
    estimate.reached(0.06)
    assert estimate.left() == pytest.approx(3.0 / 0.06 * 0.94)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "estimating"),
        (0.0, "about 5 s left"),
        (33.0, "about 35 s left"),
        (59.9, "about 60 s left"),
        (61.0, "about 1 min left"),
        (59 * 60, "about 59 min left"),
        (3599.0, "about 1 h 00 min left"),
        (2 * 3600 + 13 * 60, "about 2 h 15 min left"),
        (30 * 3600, "about 30 h 00 min left"),
    ],
)
def test_an_estimate_is_told_no_more_precisely_than_it_is(seconds: float | None, text: str) -> None:
    assert format_time_left(seconds) == text


# Lines where there is no terminal


def unit_of(units: Sequence[Expected], number: int, seconds: float, *, replayed: bool = False) -> Unit:
    name = units[number].name
    measured = ("error 9.87%", "worst down_proj 12.34%")
    return Unit(
        name, "quantize", measured, seconds, MEGABYTES * 10**6, measure_shares(units)[name][1], replayed
    )


def test_plain_lines_are_few_and_whole(clock: Clock) -> None:
    """Ten units of an eighth of a second, of which nothing is seen, and ten of 4 s."""
    lines: list[str] = []
    shown, units = Lines("convert", lines.append, 2.0, 10.0, clock), even(20)
    shown.plan(units)
    for number in range(20):
        seconds = 0.125 if number < 10 else 4.0
        for part in range(4):
            shown.report(
                ("round", f"layer {number} part {part}"), measure_shares(units)[units[number].name][0]
            )
            clock.now += seconds / 4
        shown.finished(unit_of(units, number, seconds))
    assert [line.split(", ")[0] for line in lines] == [
        "convert: round: layer 10 part 1",
        *(f"convert: layer {number}" for number in range(10, 20)),
    ]
    assert lines[0].startswith("convert: round: layer 10 part 1, 50% after 0:00:0")
    measured = "layer 18, error 9.87%, worst down_proj 12.34%, 4.0 s, 256 MB"
    assert re.fullmatch(rf"convert: {measured}, 95% after 0:00:37, about \d+ s left", lines[-2])
    assert lines[-1].endswith(", 4.0 s, 256 MB, 100% after 0:00:41"), "nothing is left to be estimated"


def test_plain_lines_of_a_long_unit(clock: Clock) -> None:
    lines: list[str] = []
    shown = Lines("convert", lines.append, 2.0, 10.0, clock)
    shown.plan(even(20))
    for second in range(35):
        shown.report((f"token {second}",), second / 20 / 35)
        clock.now += 1.0
    assert [line.split(", ")[0] for line in lines] == [f"convert: token {n}" for n in (2, 12, 22, 32)]
    assert all(line.endswith(", estimating") for line in lines)


def test_what_is_taken_over_has_no_line(clock: Clock) -> None:
    lines: list[str] = []
    shown, units = Lines("convert", lines.append, 0.0, 0.0, clock), even(20)
    shown.plan(units)
    for number in range(20):
        clock.now += 5.0
        shown.finished(unit_of(units, number, 5.0, replayed=number < 12))
    assert [line.split(",")[0] for line in lines] == [f"convert: layer {number}" for number in range(12, 20)]


def test_no_terminal_gets_plain_lines_that_say_what_was_measured(at_once: None, tmp_path: Path) -> None:
    result = succeed("quantize", BUNDLED_MODEL, "-o", tmp_path / "out", *NEAREST, "--json")
    assert all(line.isprintable() for line in result.stderr.splitlines())
    assert result.stdout.count("\n") == 1
    tensors = json.loads(result.stdout)["tensors"]
    for layer in range(4):
        errors = {
            tensor["name"].rpartition(".")[2]: tensor["relative_error"]
            for tensor in tensors
            if tensor["name"].startswith(f"model.layers.{layer}.")
        }
        worst = max(errors, key=lambda name: errors[name])
        mean = f"error {sum(errors.values()) / len(errors):.2%}"
        line = next(line for line in result.stderr.splitlines() if f": layer {layer + 1} of 4, error" in line)
        assert f", {mean}, worst {worst} {errors[worst]:.2%}, " in line
        assert re.search(r" s, \d+ MB, \d+% after 0:00:\d\d, ", line), line


# A terminal


def job() -> None:
    """One with as many layers as a large model has, done at once."""
    names = ["calibration tokens", *(f"layer {number} of {LAYERS}" for number in range(1, LAYERS + 1))]
    units = [Expected(name, name.split()[0], 1.0) for name in names]
    ends = measure_shares(units)
    with console.Console().job("convert", force=False, resume=True) as running:
        running.planned(units)
        for name in names:
            running.progress(f"quantize: round: {name}", ends[name][0])
            measured = ("error 10.23%", "worst down_proj 12.34%")
            running.finished(Unit(name, "quantize", measured, 123.4, 4567 * 10**6, ends[name][1], False))
            time.sleep(0.005)
    console.Console().note("a note that is longer than a narrow terminal has columns goes on in more rows")


@pytest.mark.parametrize("columns", [100, 60, 40])
def test_a_line_is_a_row_of_the_terminal(at_once: None, columns: int) -> None:
    code, written = on_terminal(columns, job)
    assert code == 0, written
    seen = rows(written)
    assert max(map(len, seen)) <= columns
    lines = [row for row in seen if row.endswith("4567 MB")]
    assert len(lines) == LAYERS + 1
    assert len({len(row) for row in lines}) == 1, "the numbers are below each other"
    for number, line in enumerate(lines[1:], 1):
        assert re.match(rf"layer {number} of {LAYERS}\b.* 0:02:03 +4567 MB$", line), line
        assert ("error 10.23%" in line) == (columns >= 60)
        assert ("worst down_proj 12.34%" in line) == (columns >= 100)
    bars = [row for row in seen if "estimating" in row or " left" in row]
    assert bars and all(re.search(r"\d+% 0:00:\d\d (estimating|about \d+ s left)?$", row) for row in bars)
    note = seen[next(number for number, row in enumerate(seen) if row.startswith("a note")) :]
    assert len(note) == {100: 1, 60: 2, 40: 3}[columns]
    assert all(row.startswith("    ") for row in note[1:])


def test_colour_unless_it_is_not_wanted(at_once: None) -> None:
    assert COLOUR.search(on_terminal(80, job)[1])
    assert not COLOUR.search(on_terminal(80, job, NO_COLOR="1")[1])


def test_an_error_keeps_to_the_width(tmp_path: Path) -> None:
    words = ["quantize", str(tmp_path / ("long" * 5)), "-o", str(tmp_path / "out")]
    code, written = on_terminal(60, lambda: main(words))
    assert code == 3
    seen = rows(written)
    assert seen[0].startswith("error: ") and any(row.startswith("  do: ") for row in seen)


def test_a_job_on_a_terminal(at_once: None, tmp_path: Path) -> None:
    """The real command: the lines, and then the result below them."""
    words = ["quantize", str(BUNDLED_MODEL), "-o", str(tmp_path / "out"), *NEAREST]
    code, written = on_terminal(80, lambda: main(words))
    assert code == 0, written
    seen = rows(written)
    lines = [row for row in seen if re.search(r"\d s +\d+ MB$", row)]
    assert [" ".join(row.split()[:1]) for row in lines] == ["embedding", *["layer"] * 4, "head", "checkpoint"]
    assert seen.index(lines[-1]) < next(
        n for n, row in enumerate(seen) if row.startswith("checkpoint ") and not row.endswith(" MB")
    )


# An interrupt


def press(monkeypatch: pytest.MonkeyPatch, module: object, name: str, *, times: int) -> None:
    """Ctrl-C in the middle of a function, once or twice."""
    work = getattr(module, name)

    def interrupted(*args: object, **options: object) -> object:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return work(*args, **options)

    monkeypatch.setattr(module, name, interrupted)


def test_an_interrupted_conversion_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In lowering, in verification and in the report, each of which the next run goes on from."""
    monkeypatch.setattr(console, "SHOW_AFTER", 3600.0)
    monkeypatch.setattr(converting, "SAMPLE_WINDOWS", 1)
    output = tmp_path / "my out"
    words = ["convert", "-o", str(output), *NEAREST, *SIZES]
    monkeypatch.setattr(sys, "argv", ["anequant", *words])
    for module, name, times, last in (
        (lower_package, "save_package", 1, "embedding package"),
        (checks, "verify_packages", 2, "verify checkpoint"),
        (conversion_report, "write_report", 2, "conversion files"),
    ):
        with monkeypatch.context() as patch:
            press(patch, module, name, times=times)
            result = invoke(*words)
        assert (result.exit_code, result.stdout) == (130, ""), result.stderr
        *_, stopping, kept, command = result.stderr.splitlines()
        assert stopping == "stopping when this unit of work is done; press Ctrl-C again to stop at once"
        place = re.escape(str(tmp_path / ".my out.partial"))
        assert re.fullmatch(
            rf"interrupted; kept in '{place}': \d+ units are done, the last is '{last}'", kept
        )
        assert shlex.split(command.removeprefix("to go on: ")) == ["anequant", *words]
        assert not output.exists()
    succeed(*shlex.split(command.removeprefix("to go on: "))[1:])
    assert (output / "report.html").is_file() and not (tmp_path / ".my out.partial").exists()


NOISY = """
import builtins, logging, warnings
load, heard = builtins.__import__, []
def noisy(name, *words, **options):
    if name == "torch" and not heard:
        heard.append(name)
        warnings.warn("it is registered as a pytree node already")
        logging.getLogger("torchao").warning("Failed to load a library")
    return load(name, *words, **options)
builtins.__import__ = noisy
from anequant.cli import main
main()
"""
"""A torch that warns when it is imported, as one beside another version of torchao does."""


@pytest.mark.parametrize("debug", [False, True])
def test_libraries_keep_quiet(quantize_model: Callable[..., Quantized], debug: bool) -> None:
    """Also transformers, which lists the codebooks and scales as tensors that it does not know."""
    folder = quantize_model(BUNDLED_MODEL, "w4-nearest").folder
    words = ["generate", str(folder), "--prompt", "The", "--max-tokens", "1", "--backend", "transformers"]
    ran = execute_python(NOISY, *words, "--quiet", *(["--debug"] if debug else []))
    assert (ran.exit_code, ran.stdout) == (0, "")
    for said in ("pytree", "Failed to load a library", "UNEXPECTED"):
        assert (said in ran.stderr) == debug, ran.stderr
    assert debug or ran.stderr == ""


# Help


def examples(name: str) -> list[str]:
    text = main.commands[name].help or ""
    return [line.strip() for line in text.splitlines() if line.strip().startswith("anequant ")]


@pytest.mark.parametrize("name", main.commands)
def test_every_command_has_examples_that_parse(name: str) -> None:
    lines = examples(name)
    assert lines and any(line.split()[1] == name for line in lines)
    shown = invoke(name, "--help").stdout
    for line in lines:
        assert line in shown, "an example is not wrapped"
        command, *words = shlex.split(line.partition(" > ")[0])[1:]
        main.commands[command].make_context(command, words)


def test_help_lists_examples_and_every_exit_code() -> None:
    shown = invoke("--help").stdout
    codes = {kind.exit_code for kind in errors.AnequantError.__subclasses__()} | {0, 1, errors.INTERRUPTED}
    listed = re.findall(r"^ +(\d+) +\S", shown.partition("Exit codes:")[2], re.MULTILINE)
    assert set(map(int, listed)) == codes
    for line in re.findall(r"^ +anequant (.*?)(?:   .*)?$", shown, re.MULTILINE):
        command, *words = shlex.split(line)
        main.commands[command].make_context(command, words)


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str) -> None:
    result = invoke("completion", shell)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"_ANEQUANT_COMPLETE={shell}_complete" in result.stdout
    assert invoke("completion", shell, "--json").printed == {
        "shell": shell,
        "script": result.stdout,
    }


def test_another_shell_is_refused() -> None:
    assert invoke("completion", "tcsh").exit_code == 2


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("anequant comp", {"compare", "completion"}),
        ("anequant quantize FOLDER --recipe w4-", {name for name in named_recipes() if name[:3] == "w4-"}),
        ("anequant convert FOLDER --r2 ", {"none", "hadamard", "file"}),
        ("anequant generate FOLDER --backend c", {"coreml", "coreai"}),
    ],
)
def test_bash_completes(tmp_path: Path, typed: str, expected: set[str]) -> None:
    words = typed.split(" ")
    script = tmp_path / "complete.bash"
    script.write_text(
        f"{invoke('completion', 'bash').stdout}\nCOMP_WORDS=({shlex.join(words[:-1])} '{words[-1]}')\n"
        f"COMP_CWORD={len(words) - 1}\n_anequant_completion {SCRIPT}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
    )
    ran = execute("bash", "--norc", script)
    assert set(ran.stdout.split()) == expected, ran.stderr


def test_a_recipe_may_be_a_file() -> None:
    context = click.Context(main.commands["convert"])
    option = next(item for item in context.command.params if item.name == "recipe")
    found = option.shell_complete(context, "mine")
    assert [(item.value, item.type) for item in found] == [("mine", "file")]
    assert cli_options.read_recipe({"recipe": "w4-nearest"}).rounding == "nearest"
