"""Test per-tensor checkpoints as ANEMLL reads them: its flags and closing lines. A script, not for pytest."""

import click

from anequant.cli.console import Console
from anequant.cli.options import command
from anequant.errors import UsageError

DEFAULT = "smpanaro/Qwen2.5-0.5B-4bit-PerTensor"


@click.command()
@click.option("--model", help="Folder or hub id of a per-tensor checkpoint.")
@click.option("--name", help="What to call it in the log.")
@click.option("--description", default="", help="A line for the log.")
@click.option("--skip-default", is_flag=True, help=f"Do not test {DEFAULT} as well.")
@command
def main(console: Console, model: str | None, name: str | None, description: str, skip_default: bool) -> None:
    from anequant.checkpoints.source import resolve_source
    from anequant.compat.anemll import check_sp, require_switch, verdict_lines

    require_switch()
    models = {} if skip_default else {DEFAULT: ("Qwen2.5-0.5B-4bit-PerTensor", "ANEMLL's own example")}
    if model is not None:
        models[model] = (name or model, description)
    if not models:
        raise UsageError("--skip-default without --model leaves nothing to test")
    values = {}
    for path, (title, about) in models.items():
        with console.progress(title) as progress:
            result = check_sp(resolve_source(path).folder, progress=progress)
        values[path] = result.to_dict()
        console.text("\n".join(verdict_lines(title, about, result)) + "\n")
    console.text(f"All {len(models)} tests passed\n")
    console.result(values, [])


if __name__ == "__main__":
    main()
