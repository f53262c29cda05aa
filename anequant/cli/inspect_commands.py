"""Commands that look at what is there: inspect, diff, doctor."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from anequant.cli.console import Console
from anequant.cli.options import command
from anequant.errors import UnsupportedError, UsageError

ANY = click.Path(path_type=Path)
DIFFERENT = 1
"""Exit code of `diff`, as of diff and cmp: more than this is an error."""


@click.command()
@click.argument("path", type=ANY)
@click.option("--tensor", metavar="NAME", help="Statistics and a histogram of one tensor or linear.")
@command
def inspect(console: Console, path: Path, tensor: str | None) -> None:
    """What PATH holds, and in what form.

    PATH is a checkpoint, a package or a folder of them, a bundle or an .aimodel, an output of convert, or a
    .safetensors file. Shown are tensors or operations, widths, scales, codebooks, functions, states and sizes
    against float16. No weights are looked at without --tensor, so it takes seconds.

    \b
    anequant inspect OUT
    anequant inspect OUT/checkpoint --tensor model.layers.0.mlp.down_proj
    """
    from anequant.inspection.inspect import inspect as run
    from anequant.inspection.inspect import inspect_tensor
    from anequant.report.terminal.inspect_rows import describe_inspection, describe_tensor

    if tensor is not None:
        facts = inspect_tensor(path, tensor)
        console.result({"path": str(path), **facts.to_dict()}, describe_tensor(facts))
    else:
        found = run(path)
        console.result({"path": str(path), **found.to_dict()}, describe_inspection(found))


@click.command()
@click.argument("a", type=ANY)
@click.argument("b", type=ANY)
@click.option("--logits", is_flag=True, help="Also run both, and compare their logits.")
@click.option("--text", type=ANY, metavar="FILE", help="Text for --logits; without it the bundled one.")
@command
def diff(console: Console, a: Path, b: Path, logits: bool, text: Path | None) -> None:
    """How B differs from A.

    Both are checkpoints, float or quantized, or both packages, folders of them, bundles of Core AI, or
    outputs of convert. Exit code 0 when nothing differs, 1 when something does, more for an error, as with
    diff and cmp.

    \b
    anequant diff OUT/checkpoint OTHER/checkpoint --logits
    """
    if text is not None and not logits:
        raise UsageError("--text is what logits are computed on", remedy="add --logits")
    from anequant.inspection.diff_paths import diff as run
    from anequant.report.terminal.diff_rows import describe_differences

    with console.progress("diff") as progress:
        found = run(a, b, compare_logits=logits, text=text, progress=progress)
    console.result(found.to_dict(), describe_differences(found))
    if not found.same:
        sys.exit(DIFFERENT)


@click.command()
@command
def doctor(console: Console) -> None:
    """Whether this machine can run anequant.

    Looks at versions, libraries, cores, memory, disk, and on a Mac its tools. Exit code 4 when something is
    missing or of a wrong version; warnings do not count.

    \b
    anequant doctor
    """
    from anequant.doctor import describe_checks, diagnose, has_failure

    checks = diagnose()
    console.result({"checks": [asdict(check) for check in checks]}, describe_checks(checks))
    if has_failure(checks):
        sys.exit(UnsupportedError.exit_code)
