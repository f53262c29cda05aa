"""Write calibration windows of WikiText-2, or of a text, to a JSON file: ANEMLL's flags over anequant."""

from pathlib import Path

import click

from anequant.cli.console import Console
from anequant.cli.options import command


@click.command()
@click.option("--nsamples", type=click.IntRange(1), default=128, show_default=True, help="Windows.")
@click.option("--seqlen", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a window.")
@click.option("--output", type=click.Path(path_type=Path), default="calib.json", show_default=True)
@click.option("--model", default="Qwen/Qwen2.5-0.5B", show_default=True, help="Whose tokenizer.")
@click.option("--text", default="wikitext2", show_default=True, help="A text file, or wikitext2.")
@command
def main(console: Console, nsamples: int, seqlen: int, output: Path, model: str, text: str) -> None:
    from anequant.calibration.tokens import save_calibration
    from anequant.checkpoints.source import resolve_source

    folder = resolve_source(model).folder
    count = save_calibration(output, folder, text, count=nsamples, length=seqlen)
    console.text(f"Saved {count} calibration samples to {output}\n")
    console.result({"output": str(output), "samples": count, "length": seqlen}, [])


if __name__ == "__main__":
    main()
