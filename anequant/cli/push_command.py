"""The command that shares an output."""

from __future__ import annotations

from pathlib import Path

import click

from anequant.cli.console import Console
from anequant.cli.options import command


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
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
