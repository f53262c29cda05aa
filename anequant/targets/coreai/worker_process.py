"""Jobs of `worker`, done in a process of their own, and what is told when it aborts, crashes or hangs."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MODULE = "anequant.targets.coreai.worker"
LAST_WORDS = 300


def make_command(job: str, *arguments: Path) -> list[str]:
    """What starts a job of `worker`."""
    return [sys.executable, "-m", MODULE, job, *map(str, arguments)]


def tell_ending(code: int, where: str, words: bytes) -> str:
    """How a process ended on its own, of which stderr is known: "ended with signal 6 (SIGABRT) in x: ..."."""
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    lines = words.decode(errors="replace").strip().splitlines()
    last = f": {lines[-1][:LAST_WORDS]}" if lines else ""
    return f"ended with {how} {where}{last}"


def run_job(job: str, arguments: Sequence[Path], where: str, longest: float) -> str | None:
    """Do a job to its end; return how it failed, None where it did not.

    `where` says what it was at, as in "while it wrote the functions"; `longest` is in seconds.
    """
    try:
        done = subprocess.run(
            make_command(job, *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=longest,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"did not answer within {longest:g} s {where}"
    return tell_ending(done.returncode, where, done.stderr) if done.returncode else None
