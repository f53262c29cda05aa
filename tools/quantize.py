"""Published command lines for QuaRot, over anequant: `run` as in the system with runtime hooks, `quark` as
AMD Quark's quantize_quark.py, `llmc` as LLMC with its YAML.

    python tools/quantize.py run --src MODEL --dst FOLDER --method quarot --bits 4 --acts-bits 4 --kv-bits 4
    python tools/quantize.py quark --model_dir MODEL --output_dir FOLDER --quant_scheme w_int8_per_tensor
    python tools/quantize.py llmc --config FILE.yml
"""

from __future__ import annotations

from pathlib import Path

import click

from anequant.cli.console import Console
from anequant.cli.options import command

FILE = click.Path(path_type=Path)
replacing = click.option("--force", is_flag=True, help="Replace an existing output folder.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Quantize a model by the words of another system."""


@main.command()
@click.option("--src", required=True, help="Folder or hub id of the float model.")
@click.option("--dst", required=True, type=FILE, help="Folder to write the named folder of the model into.")
@click.option("--method", required=True, help="quarot.")
@click.option("--bits", type=int, default=4, help="Bits of weights.")
@click.option("--acts-bits", type=int, default=8, help="Bits of activations: 4, 8 or 16.")
@click.option("--kv-bits", type=int, default=8, help="Bits of the KV cache: 4, 8 or 16.")
@click.option("--group-size", type=int, default=64, help="Columns that share a scale: 32, 64 or 128.")
@click.option("--rotation-method", default="pca", help="pca or hadamard.")
@click.option("--calib", default="self", help="A text, calib.json, wikitext2 or self.")
@click.option("--seed", type=click.IntRange(0), default=13, help="Seed of rotations and calibration.")
@replacing
@command
def run(
    console: Console,
    src: str,
    dst: Path,
    method: str,
    bits: int,
    acts_bits: int,
    kv_bits: int,
    group_size: int,
    rotation_method: str,
    calib: str,
    seed: int,
    force: bool,
) -> None:
    """Rotate and quantize into DST/{base}_QuaRot_w4_g64_a4_kv4_headfp16; 8 and 16 bits of activations and
    cache are left out of the name."""
    from dataclasses import replace

    from anequant.calibration.tokens import calibrate_on_whole_file
    from anequant.checkpoints.source import resolve_source
    from anequant.compat.quarot_hooks import make_hooked_recipe, quantize_hooked
    from anequant.report.terminal import results as text

    recipe = make_hooked_recipe(
        method,
        bits=bits,
        acts_bits=acts_bits,
        kv_bits=kv_bits,
        group_size=group_size,
        rotation_method=rotation_method,
        seed=seed,
    )
    calibration = replace(calibrate_on_whole_file(calib), seed=seed)
    if not recipe.calibrated:
        console.note("Hadamard rotations and nearest rounding: no use for calibration data")
    with console.progress("quantize") as progress:
        output, result = quantize_hooked(resolve_source(src), dst, recipe, calibration, progress, force=force)
    console.result({"output": str(output), **result.to_dict()}, text.describe_quantization(output, result))


@main.command()
@click.option("--model_dir", "model", required=True, help="Folder or hub id of the float model.")
@click.option("--output_dir", "output", required=True, type=FILE, help="New folder to write.")
@click.option(
    "--quant_scheme",
    "scheme",
    required=True,
    help="w_int8_per_tensor, w_int8_a_int8_per_tensor_sym, or a recipe.",
)
@click.option("--pre_quantization_optimization", "optimization", default="none", help="quarot or none.")
@click.option("--pre_optimization_config_file_path", "config", type=FILE, help="JSON: how quarot rotates.")
@click.option("--dataset", "calib", default="self", help="A text, calib.json, wikitext2 or self.")
@replacing
@command
def quark(
    console: Console,
    model: str,
    output: Path,
    scheme: str,
    optimization: str,
    config: Path | None,
    calib: str,
    force: bool,
) -> None:
    """Quantize by a scheme of AMD Quark, after QuaRot's rotations if asked for."""
    from anequant.calibration.tokens import calibrate_on_whole_file
    from anequant.checkpoints.source import resolve_source
    from anequant.compat.quark import WHOLE, translate_recipe
    from anequant.jobs.control import Run
    from anequant.pipeline.quantize import quantize
    from anequant.report.terminal import results as text
    from anequant.request import Request

    chosen = translate_recipe(scheme, optimization, config, model, rotated=WHOLE)
    calibration = calibrate_on_whole_file(calib)
    for note in chosen.notes:
        console.note(note)
    with console.progress("quantize") as progress:
        source = resolve_source(model)
        result = quantize(Request(source, chosen.recipe, calibration), output, Run(progress, force=force))
    console.result({"output": str(output), **result.to_dict()}, text.describe_quantization(output, result))


@main.command()
@click.option("--config", "path", required=True, type=FILE, help="LLMC's YAML: methods Quarot and GPTQ.")
@replacing
@command
def llmc(console: Console, path: Path, force: bool) -> None:
    """Rotate (method Quarot with save_trans), or quantize, as LLMC's YAML says."""
    from anequant.compat.llmc import QUANTIZED, TRANSFORMED, plan_llmc, run_llmc
    from anequant.report.terminal import results as text

    plan = plan_llmc(path)
    for note in plan.notes:
        console.note(note)
    with console.progress("llmc") as progress:
        result = run_llmc(plan, progress, force=force)
    rows = []
    if result.rotated is not None:
        rows += text.describe_rotation(plan.output / TRANSFORMED, result.rotated)
    if result.quantized is not None:
        rows += text.describe_quantization(plan.output / QUANTIZED, result.quantized)
    console.result({"output": str(plan.output), **result.to_dict()}, rows)


if __name__ == "__main__":
    main()
