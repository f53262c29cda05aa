"""The command line. Heavy imports wait until a command runs, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anequant.cli_options import (
    LOWERING,
    calibration_options,
    command,
    lowering_options,
    output_options,
    read_calibration,
    read_recipe,
    recipe_options,
)
from anequant.console import Console

FOLDER = click.Path(path_type=Path)
EPILOG = (
    "Exit codes: 0 ok, 2 usage, 3 bad input, 4 unsupported, 5 no disk or memory, 6 verification failed, "
    "130 interrupted."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(package_name="anequant")
def main() -> None:
    """Quantize Hugging Face LLMs for Apple's Neural Engine, on any system.

    MODEL is a folder, or a hub id with an optional revision: org/name@revision.
    """


@main.command()
@click.argument("model")
@output_options
@recipe_options
@calibration_options
@command
def quantize(console: Console, model: str, output: Path, force: bool, **options: Any) -> None:
    """Fold, rotate and quantize MODEL into a new checkpoint folder."""
    recipe, calibration = read_recipe(options), read_calibration(options)
    from anequant.checkpoints.source import resolve_source
    from anequant.pipeline.quantize import quantize as run
    from anequant.report import text

    with console.progress("quantize") as progress:
        result = run(resolve_source(model), output, recipe, calibration, force=force, progress=progress)
    console.result({"output": str(output), **result.to_dict()}, text.quantized(output, result))


@main.command()
@click.argument("checkpoint", type=FOLDER)
@output_options
@lowering_options
@command
def lower(console: Console, checkpoint: Path, output: Path, force: bool, **sizes: Any) -> None:
    """Lower a quantized CHECKPOINT to Core ML packages in a new folder."""
    from anequant.pipeline.lower import LowerOptions
    from anequant.pipeline.lower import lower as run
    from anequant.report import text

    with console.progress("lower") as progress:
        result = run(checkpoint, output, LowerOptions(**sizes), force=force, progress=progress)
    console.result({"output": str(output), **result.to_dict()}, text.lowered(output, result))


@main.command()
@click.argument("model", required=False)
@output_options
@recipe_options
@calibration_options
@lowering_options
@command
def convert(console: Console, model: str | None, output: Path, force: bool, **options: Any) -> None:
    """Quantize MODEL, lower it and verify the packages; without MODEL, the bundled one."""
    recipe, calibration = read_recipe(options), read_calibration(options)
    from anequant.checkpoints.source import resolve_source
    from anequant.pipeline.convert import convert as run
    from anequant.pipeline.lower import LowerOptions
    from anequant.report import text

    source = resolve_source(model)
    if model is None:
        console.note(f"no model named: converting the bundled {source.name}")
    sizes = LowerOptions(**{name: options[name] for name in LOWERING})
    with console.progress("convert") as progress:
        result = run(source, output, recipe, calibration, sizes, force=force, progress=progress)
    console.result(
        {"model": source.name, "output": str(output), **result.to_dict()}, text.converted(output, result)
    )


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--checkpoint", type=FOLDER, help="The checkpoint that packages in FOLDER were made from.")
@command
def verify(console: Console, folder: Path, checkpoint: Path | None) -> None:
    """Read a written FOLDER back and check it: an output of convert, quantize or lower."""
    from anequant.pipeline.verify import verify_folder
    from anequant.report import text

    with console.progress("verify") as progress:
        written, packages = verify_folder(folder, checkpoint, progress=progress)
    values = {
        "checkpoint": None if written is None else written.to_dict(),
        "packages": None if packages is None else packages.to_dict(),
    }
    console.result({"folder": str(folder), **values}, text.verified(written, packages))


@main.command(name="eval")
@click.argument("checkpoint")
@click.option("--text", "text_file", required=True, type=FOLDER, help="Text to evaluate on.")
@click.option("--base", metavar="MODEL", help="Float model to compare with: extra NLL, KL, top-1.")
@click.option("--windows", type=click.IntRange(1), default=32, show_default=True, help="Most windows.")
@click.option("--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens a window.")
@command
def evaluate(
    console: Console, checkpoint: str, text_file: Path, base: str | None, windows: int, length: int
) -> None:
    """Perplexity of CHECKPOINT on a text, and its divergence from a base model."""
    from anequant.pipeline.evaluate import evaluate_text
    from anequant.report import text

    with console.progress("eval") as progress:
        result = evaluate_text(checkpoint, text_file, base, windows=windows, length=length, progress=progress)
    console.result({"checkpoint": checkpoint, **result.to_dict()}, text.quality(result))


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@command
def generate(console: Console, folder: Path, prompt: str, max_tokens: int) -> None:
    """Continue a text greedily with the packages in FOLDER, run by the interpreter."""
    from anequant.pipeline.generate import continue_text

    pieces = []
    for piece in continue_text(folder, prompt, max_tokens):
        pieces.append(piece)
        console.text(piece)
    console.text("\n")
    console.result({"text": "".join(pieces)}, [])
