"""Commands that take an output: verify, lint, report, push."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from anequant.cli.console import Console
from anequant.cli.options import command
from anequant.errors import VerificationError

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--checkpoint", type=FOLDER, help="The checkpoint that what is in FOLDER was made from.")
@command
def verify(console: Console, folder: Path, checkpoint: Path | None) -> None:
    """Read a written FOLDER back and check it: an output of convert, quantize or lower.

    \b
    anequant verify OUT
    anequant verify PACKAGES --checkpoint CHECKPOINT
    """
    from anequant.report.terminal import results as text
    from anequant.verification.verify import verify_folder

    with console.progress("verify") as progress:
        verified = verify_folder(folder, checkpoint, progress=progress)
    console.result({"folder": str(folder), **verified.to_dict()}, text.describe_verification(verified))


@click.command()
@click.argument("path", type=FOLDER)
@click.option("--chip", default="any", show_default=True, help="For one generation: a14 to a19, m1 to m6.")
@command
def lint(console: Console, path: Path, chip: str) -> None:
    """What the packages or the asset in PATH do that the Neural Engine cannot run, or runs slowly.

    \b
    anequant lint OUT/packages --chip m1
    """
    from dataclasses import asdict

    from anequant.inspection.lint_path import lint_path as run
    from anequant.report.terminal import results as text
    from anequant.targets.shared.finding import select_errors

    findings = run(path, chip)
    console.result({"findings": [asdict(finding) for finding in findings]}, text.describe_lint(findings))
    if select_errors(findings):
        sys.exit(VerificationError.exit_code)


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--base", metavar="MODEL", help="The float model it was made from, where anequant cannot tell.")
@click.option("--text", type=FOLDER, help="Text to measure on, instead of the bundled one.")
@command
def report(console: Console, folder: Path, base: str | None, text: Path | None) -> None:
    """Write report.html and report.json of FOLDER, an output of convert or quantize, into it.

    What it cost, and where: sizes, quality, and for every projection the errors and outliers before and after
    rotation. convert writes them too.

    \b
    anequant report OUT
    anequant report CHECKPOINT --base org/name --text FILE
    """
    from anequant.report.page.write_report import write_report
    from anequant.report.terminal.results import describe_report

    with console.progress("report") as progress:
        written = write_report(folder, base=base, text=text, progress=progress)
    console.result(written.to_dict(), describe_report(written))


@click.command()
@click.argument("folder", type=FOLDER)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--yes", is_flag=True, help="Upload. Without it nothing leaves this machine.")
@command
def push(console: Console, folder: Path, repo: str, private: bool, yes: bool) -> None:
    """Upload an output FOLDER to the repository REPO (org/name) of the Hugging Face Hub.

    Without --yes it only tells what would be uploaded. Either way the files are first compared with their
    hashes. The token is that of `hf auth login`.

    \b
    anequant push OUT org/name
    anequant push OUT org/name --private --yes
    """
    from anequant.outputs.push import plan_upload
    from anequant.outputs.push import push as run
    from anequant.report.terminal.results import describe_upload

    with console.progress("push") as progress:
        upload = plan_upload(folder, repo, private=private, progress=progress)
        if yes:
            upload = run(folder, upload, progress)
    console.result({"folder": str(folder), **upload.to_dict()}, describe_upload(upload))
