"""The command line: one group of commands, and the console, which alone prints."""

from anequant.cli.commands import main

__all__ = ["main"]
