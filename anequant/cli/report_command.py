"""The command that explains an output: report."""

from __future__ import annotations

from pathlib import Path

import click

from anequant.cli.console import Console
from anequant.cli.options import command


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="The float model it was made from, where anequant cannot tell.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="Text to measure on, instead of the bundled one."
)
@command
def report(console: Console, folder: Path, base: str | None, text: Path | None) -> None:
    """Write report.html and report.json of FOLDER, an output of convert or quantize, into it.

    What it cost, and where: sizes, quality, and for every projection the errors and outliers before and after
    rotation. convert writes them too.

    \b
    anequant report OUT
    anequant report CHECKPOINT --base org/name --text FILE
    """
    from anequant.report.page.write import write_report
    from anequant.report.terminal.results import describe_report

    with console.progress("report") as progress:
        written = write_report(folder, base=base, text=text, progress=progress)
    console.result(written.to_dict(), describe_report(written))
