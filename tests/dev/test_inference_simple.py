"""Continue a prompt with a quantized model: ANEMLL's flags over anequant. A script, not for pytest."""

from pathlib import Path

import click

from anequant.cli.console import Console
from anequant.cli.options import command

BACKENDS = click.Choice(["anemll", "transformers"])


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Checkpoint or packages.")
@click.option("--prompt", default="Hello, how are you?", show_default=True)
@click.option("--max_tokens", "--max-tokens", type=click.IntRange(1), default=50, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--backend", type=BACKENDS, default="anemll", show_default=True)
@command
def main(
    console: Console, model: Path, prompt: str, max_tokens: int, temperature: float, backend: str
) -> None:
    from anequant.compat.anemll import open_published_model
    from anequant.runtime.continue_text import continue_text
    from anequant.runtime.sampling import Sampling

    pieces = []
    for piece in continue_text(
        open_published_model(model, backend), prompt, max_tokens, Sampling(temperature=temperature)
    ):
        pieces.append(piece)
        console.text(piece)
    console.text("\n")
    console.result({"backend": backend, "text": "".join(pieces)}, [])


if __name__ == "__main__":
    main()
