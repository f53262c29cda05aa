"""Running the command line, in this process or in one of its own: how it ended and what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from anequant.cli import main

SCRIPT = Path(sys.executable).with_name("anequant")
"""The installed command."""

SECONDS = 1800.0
"""After which a process is given up."""


Variables = Mapping[str, str | None]
"""Variables of the environment beside those of this process; one that is None is unset."""

NONE: Variables = {}


@dataclass(frozen=True)
class Ran:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def printed(self) -> dict[str, Any]:
        """The object that is all of stdout, which must be JSON to the letter and one line."""
        assert self.stdout.count("\n") == 1 and self.stdout.endswith("\n"), self.stdout
        value = json.loads(self.stdout, parse_constant=_refuse)
        assert isinstance(value, dict)
        return value


def invoke(
    *words: object, command: click.Command = main, typed: str | bytes | None = None, env: Variables = NONE
) -> Ran:
    """Run a command in this process, with what is `typed` on stdin.

    SystemExit becomes the exit code, any other exception is the caller's.
    """
    arguments = [str(word) for word in words]
    result = CliRunner(env=env).invoke(command, arguments, input=typed, catch_exceptions=False)
    return Ran(result.exit_code, result.stdout, result.stderr)


def succeed(*words: object, command: click.Command = main, typed: str | bytes | None = None) -> Ran:
    """Run a command in this process, and fail unless it ends with exit code 0."""
    ran = invoke(*words, command=command, typed=typed)
    assert ran.exit_code == 0, ran.stdout + ran.stderr
    return ran


def execute(*command: object, folder: Path | None = None, env: Variables = NONE) -> Ran:
    """Run a program in a process of its own, in `folder`."""
    variables = {**os.environ, **env}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=SECONDS,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def execute_python(code: str, *words: object, folder: Path | None = None, env: Variables = NONE) -> Ran:
    """Run Python code in a process of its own, with these words as its arguments."""
    return execute(sys.executable, "-c", code, *words, folder=folder, env=env)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
