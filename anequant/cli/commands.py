"""The command line. Heavy imports wait until a command runs, so that --help is quick."""

from __future__ import annotations

import click

from anequant.cli.batch_command import batch
from anequant.cli.compare_command import compare
from anequant.cli.completion_command import completion
from anequant.cli.inspect_commands import diff, doctor, inspect
from anequant.cli.job_commands import convert, lower, plan, quantize, rotate
from anequant.cli.model_commands import chat, evaluate, generate, profile
from anequant.cli.output_commands import lint, push, report, verify

EPILOG = """\b
Examples:
  anequant convert -o OUT                  the bundled model, in a minute
  anequant plan org/name                   what convert would do, before it does
  anequant convert org/name -o OUT
  anequant generate OUT/packages --prompt "The old house"

\b
Exit codes:
  0    ok
  1    diff found a difference
  2    wrong usage: an option, a recipe or the output folder
  3    bad input: the model is missing, damaged or contradicts itself
  4    unsupported: a sound input that this version cannot handle
  5    not enough disk or memory
  6    verification failed
  130  interrupted; the command that goes on is printed
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(package_name="anequant")
def main() -> None:
    """Quantize Hugging Face LLMs for Apple's Neural Engine, on any system.

    MODEL is a folder, or a hub id with an optional revision: org/name@revision.
    """


for job in (quantize, rotate, lower, convert, plan, batch, compare):
    main.add_command(job)
for other in (
    verify,
    lint,
    report,
    push,
    inspect,
    diff,
    doctor,
    evaluate,
    generate,
    chat,
    profile,
    completion,
):
    main.add_command(other)
