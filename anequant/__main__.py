"""The program `anequant`, also as `python -m anequant`."""

from __future__ import annotations

from anequant.jobs.interrupts import leave_until_begun


def main() -> None:
    """Run the command line; from here on Ctrl-C ends the process as documented, also while modules load."""
    leave_until_begun()
    from anequant.cli import main as commands
    from anequant.cli.ending import PROGRAM

    commands(prog_name=PROGRAM)


if __name__ == "__main__":
    main()
