"""Options that several commands share, and how a command ends when something fails."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from glob import escape, glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from anequant.calibration.shares import make_calibration
from anequant.cli.console import Console
from anequant.cli.ending import NO_RESUME, ending_as_documented
from anequant.evaluation import LENGTH, WINDOWS
from anequant.recipe import LARGEST_SEED, Calibration, Recipe
from anequant.recipe_files import DEFAULT_RECIPE, ROTATION_KEYS, load_recipe, named_recipes

if TYPE_CHECKING:
    from anequant.request import Request

Command = Callable[..., None]


def command(run: Command) -> Command:
    """Add --json, --quiet and --debug; report errors as documented instead of by traceback.

    `run` gets a Console as its first argument.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("--quiet", is_flag=True, help="Print errors only.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error, and libraries' warnings.")
    @functools.wraps(run)
    def wrapped(*args: Any, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
        console = Console(json=as_json, quiet=quiet)
        with ending_as_documented(console, debug, options):
            run(console, *args, **options)

    return wrapped


def output_options(run: Command) -> Command:
    """Add -o/--output, --force and --resume."""
    run = resume_options(run, force="Replace an existing output folder.")
    path = click.Path(path_type=Path)
    return click.option("-o", "--output", required=True, type=path, help="New folder to write.")(run)


def resume_options(run: Command, *, force: str) -> Command:
    """Add --force, which does what `force` says, and --resume."""
    text = "Whether to go on where an interrupted run to the same folder stopped, or to start over."
    run = click.option(f"--resume/{NO_RESUME}", default=True, show_default=True, help=text)(run)
    return click.option("--force", is_flag=True, help=force)(run)


LUT_OPTIONS = {"embedding_bits": "--lut-embeddings", "bits": "--lut-ffn", "head_bits": "--lut-head"}
"""ANEMLL's words for three of the recipe's keys; there, none means float16."""


def _width(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    if value is None or value == "none":
        return None if value is None else 16
    if not value.isdigit():
        raise click.BadParameter(f"'{value}' is neither none nor a number of bits")
    return int(value)


def _tuning(context: click.Context, option: click.Parameter, value: str | None) -> int | float | None:
    """Return steps as an int, and minutes, a number that ends in min, as a float."""
    if value is None:
        return None
    number = value.removesuffix("min")
    try:
        return int(value) if number == value else float(number)
    except ValueError:
        text = f"'{value}' is neither a number of steps nor of minutes, as in 30min"
        raise click.BadParameter(text) from None


def recipe_options(run: Command) -> Command:
    """Add --recipe, one option for every field of Recipe, and --rotations; `read_recipe` reads them."""
    return _recipe_options(run, [item.name for item in dataclasses.fields(Recipe)])


def rotation_options(run: Command) -> Command:
    """Add what `recipe_options` adds, for the keys of rotations only."""
    return _recipe_options(run, ROTATION_KEYS)


def _recipe_options(run: Command, keys: Sequence[str]) -> Command:
    file = click.Path(path_type=Path)
    text = "A rotations.safetensors to take R1 from with --r1 file, and R2 with --r2 file."
    run = click.option("--rotations", type=file, metavar="FILE", help=text)(run)
    for item in reversed([item for item in dataclasses.fields(Recipe) if item.name in keys]):
        choices = item.metadata["choices"]
        metavar = "|".join(str(choice) for choice in choices) if choices else None
        name = f"--{item.name.replace('_', '-')}"
        text = item.metadata["help"]
        if isinstance(item.default, bool):
            run = click.option(f"{name}/--no-{name[2:]}", default=None, help=text)(run)
        elif item.name == "tune":
            run = click.option(name, callback=_tuning, metavar="STEPS|MINUTESmin", help=text)(run)
        elif item.name in LUT_OPTIONS:
            flags = (name, LUT_OPTIONS[item.name], item.name)
            run = click.option(*flags, callback=_width, metavar=metavar, help=text)(run)
        else:
            complete = partial(_matching, [str(choice) for choice in choices or ()])
            kind = type(item.default)
            run = click.option(name, type=kind, metavar=metavar, help=text, shell_complete=complete)(run)
    names = ", ".join(named_recipes())
    text = f"One of {names}, or a file. Default: {DEFAULT_RECIPE}. The options below override it."
    return click.option("--recipe", metavar="NAME|FILE", help=text, shell_complete=_recipes)(run)


def _matching(
    words: Sequence[str], context: click.Context, option: click.Parameter, begun: str
) -> list[CompletionItem[str]]:
    """Return the words that begin as what was typed."""
    return [CompletionItem(word) for word in words if word.startswith(begun)]


def _recipes(context: click.Context, option: click.Parameter, begun: str) -> list[CompletionItem[str]]:
    """Return names of recipes; files where none begins as what was typed."""
    names = _matching(list(named_recipes()), context, option, begun)
    return names or [CompletionItem(begun, type="file")]


def complete_recipes(
    context: click.Context, option: click.Parameter, begun: str
) -> list[CompletionItem[str]]:
    """Complete the last of several recipes between commas; those before it are not offered again. A shell
    completes a file's name alone, so beginnings of files after a comma are looked up here."""
    *before, last = begun.split(",")
    names = [name for name in named_recipes() if name.startswith(last) and name not in before]
    if not names and not before:
        return [CompletionItem(begun, type="file")]
    files = [] if names else sorted(glob(f"{escape(last)}*"))
    return [CompletionItem(",".join([*before, found])) for found in names or files]


def read_recipe(options: dict[str, Any], folder: Path | None = None) -> Recipe:
    """Read the Recipe of `recipe_options` or `rotation_options`, for the model in `folder` where it is known.

    Raises what `load_recipe_for` raises.
    """
    names = [item.name for item in dataclasses.fields(Recipe)]
    overrides = {name: options[name] for name in names if options.get(name) is not None}
    if isinstance(overrides.get("tune"), float):
        overrides |= {"tune": 0, "tune_minutes": overrides["tune"]}
    if folder is None:
        return load_recipe(options["recipe"], overrides)
    from anequant.checkpoints.manifest import load_recipe_for

    return load_recipe_for(folder, options["recipe"], overrides)


def calibration_options(run: Command) -> Command:
    """Add --calib, --calib-samples, --calib-length, --calib-seed and --calib-chat; `read_calibration` reads
    them."""
    default = Calibration()
    source = "Tokens to calibrate on: self (sampled from the model), wikitext2, a text file, or JSON rows;"
    source += " several times for several, =NUMBER after one is its weight."
    chat = "Write rows of messages, or prompt and completion, as conversations that begin windows."
    run = click.option("--calib-chat", is_flag=True, help=chat)(run)
    for name, kind, value, text in (
        ("seed", click.IntRange(0, LARGEST_SEED), default.seed, "Seed of the windows' choice or sampling."),
        ("length", click.IntRange(2), default.length, "Tokens in a window."),
        ("samples", click.IntRange(1), default.samples, "Number of windows, of all sources together."),
    ):
        run = click.option(f"--calib-{name}", type=kind, default=value, show_default=True, help=text)(run)
    metavar = "SOURCE[=WEIGHT]"
    return click.option(
        "--calib", multiple=True, default=default.sources, show_default=True, metavar=metavar, help=source
    )(run)


def read_calibration(options: dict[str, Any]) -> Calibration:
    """Return the Calibration that `calibration_options` ask for; raises as `make_calibration`."""
    sizes = options["calib_samples"], options["calib_length"], options["calib_seed"]
    return make_calibration(options["calib"], *sizes, chat=options["calib_chat"])


def read_request(console: Console, model: str | None, options: dict[str, Any]) -> Request:
    """MODEL's folder and what `recipe_options` or `rotation_options`, and `calibration_options` say of it;
    a wrong recipe is noticed before anything heavy is imported. Code in the folder is told, and not run."""
    read_recipe(options)
    from anequant.checkpoints.side_files import find_custom_code
    from anequant.checkpoints.source import resolve_source
    from anequant.request import Request

    source = resolve_source(model)
    code = find_custom_code(source.folder)
    if code:
        console.note(f"ignored, no code of a checkpoint is run: {', '.join(code)}")
    recipe = read_recipe(options, source.folder)
    return Request(source, recipe, read_calibration(options), options["rotations"])


def generation_options(run: Command) -> Command:
    """Add --backend, --max-tokens, and one option for every field of Sampling."""
    kinds = (
        ("--seed", click.IntRange(0, LARGEST_SEED), 0, "Seed of sampling."),
        ("--top-p", click.FloatRange(0, 1), 1.0, "Sample from the best tokens that make up this share."),
        ("--top-k", click.IntRange(0), 0, "Sample from this many best tokens; 0 means all."),
        ("--temperature", click.FloatRange(0), 0.0, "0 takes the best token, 1 the model's distribution."),
        ("--max-tokens", click.IntRange(1), 64, "Most tokens to add."),
    )
    for name, kind, default, text in kinds:
        run = click.option(name, type=kind, default=default, show_default=True, help=text)(run)
    text = (
        "What runs the model: an interpreter, ours for packages and Apple's for an asset of Core AI (coreai),"
    )
    text += " Core ML on a Mac, or transformers a checkpoint."
    return backend_option("interpreter", help=text)(run)


def window_options(run: Command) -> Command:
    """Add --windows and --length."""
    for name, least, default, text in (
        ("--length", 2, LENGTH, "Tokens a window."),
        ("--windows", 1, WINDOWS, "Most windows."),
    ):
        kind = click.IntRange(least)
        run = click.option(name, type=kind, default=default, show_default=True, help=text)(run)
    return run


def backend_option(default: str, *, help: str) -> Callable[[Command], Command]:
    """Add --backend."""
    backends = click.Choice(["interpreter", "coreml", "coreai", "transformers"])
    return click.option("--backend", type=backends, default=default, show_default=True, help=help)
