"""Completion in a shell: the command that prints its script, and what is completed."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from anequant.cli_options import PROGRAM, command
from anequant.console import Console

SHELLS = ("bash", "zsh", "fish")
VARIABLE = f"_{PROGRAM.upper()}_COMPLETE"
"""Set, it makes the command print completions: click's convention."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
@command
def completion(console: Console, context: click.Context, shell: str) -> None:
    """Print the script that completes anequant's commands, options and recipes in SHELL.

    bash (4.4 or later) and zsh read it from their startup file, fish from its folder of completions:

    \b
    eval "$(anequant completion bash)"                  in ~/.bashrc
    eval "$(anequant completion zsh)"                   in ~/.zshrc, after compinit
    anequant completion fish > ~/.config/fish/completions/anequant.fish

    Examples:

    \b
    anequant completion bash
    anequant completion fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, shell
    script = kind(context.find_root().command, {}, PROGRAM, VARIABLE).source()
    console.text(script)
    console.result({"shell": shell, "script": script}, [])
