"""Completion in a shell: the command that prints its script, and what is completed."""

from __future__ import annotations

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
)

from anequant.cli.console import Console
from anequant.cli.ending import PROGRAM
from anequant.cli.options import command

VARIABLE = f"_{PROGRAM.upper()}_COMPLETE"
"""Set, it makes the command print completions: click's convention."""


class JoinedValues(ShellComplete):
    """Completes as click does, and `--option=value` too."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """bash tells the `=` as a word of its own, between name and value; the others complete the whole."""
        name, joined, _ = incomplete.partition("=")
        items = super().get_completions([word for word in args if word != "="], incomplete)
        if name.startswith("--") and joined:
            for item in items:
                item.value = f"{name}={item.value}"
        return items


class Bash(JoinedValues, BashComplete): ...


class Zsh(JoinedValues, ZshComplete): ...


class Fish(JoinedValues, FishComplete):
    """Its script takes a completion apart at the first comma alone: recipes are a list of several."""

    source_template = FishComplete.source_template.replace('split ","', 'split --max 1 ","')


SHELLS = tuple(add_completion_class(kind).name for kind in (Bash, Zsh, Fish))


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
