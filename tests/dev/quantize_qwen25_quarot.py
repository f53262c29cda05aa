"""Rotate and quantize a Qwen2.5 checkpoint: ANEMLL's flags and closing lines over anequant."""

from pathlib import Path
from typing import Any

import click

from anequant.cli.console import Console
from anequant.cli.options import command
from anequant.request import Request


@click.command()
@click.option("--model_dir", "model", required=True, help="Folder or hub id of the float model.")
@click.option("--calib_data", "calib", default="self", help="calib.json, a text, wikitext2 or self.")
@click.option("--quant_scheme", "scheme", default="w_int4_per_tensor", help="Or w_int8_per_tensor, a recipe.")
@click.option("--pre_quantization_optimization", "optimization", default="quarot", help="Or none.")
@click.option("--quarot_config", "config", type=Path, help="JSON file, see qwen25_quarot.json.")
@click.option("--output_dir", "output", required=True, type=Path, help="New folder to write.")
@click.option("--premultiply_scales", "premultiply", is_flag=True, help="Write unit scales.")
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
@command
def main(console: Console, model: str, calib: str, output: Path, force: bool, **words: Any) -> None:
    from anequant.calibration.tokens import calibrate_on_whole_file
    from anequant.checkpoints.source import resolve_source
    from anequant.compat.quark import BLOCKS, closing_lines, translate_recipe
    from anequant.pipeline.quantize import quantize

    chosen = translate_recipe(model=model, rotated=BLOCKS, **words)
    for note in chosen.notes:
        console.note(note)
    with console.watched("quantize", force=force) as run:
        request = Request(resolve_source(model), chosen.recipe, calibrate_on_whole_file(calib))
        result = quantize(request, output, run)
    console.text("\n".join(closing_lines(output, result)) + "\n")
    console.result({"output": str(output), **result.to_dict()}, [])


if __name__ == "__main__":
    main()
