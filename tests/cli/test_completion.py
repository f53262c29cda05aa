"""Completion as it is in a shell: each that is installed is started on a terminal, and typed into."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

STARTS = {
    "bash": ("--norc", "--noprofile", "-i"),
    "zsh": ("-f", "-i"),
    "fish": ("--no-config", "-i"),
}
SETS_UP = {
    "bash": "PS1='ready> '; bind 'set bell-style none'; eval \"$(anequant completion bash)\"; "
    "save() {{ printf '%s' \"$READLINE_LINE\" > {line}; }}; bind -x '\"\\C-g\": save'",
    "zsh": "PS1='ready> '; setopt no_beep; autoload -U compinit; compinit -u -D; "
    'eval "$(anequant completion zsh)"; save() {{ printf "%s" "$BUFFER" > {line} }}; zle -N save; '
    "bindkey '^G' save",
    "fish": "function fish_prompt; echo 'ready> '; end; anequant completion fish | source; "
    "bind \\cg 'commandline > {line}'",
}
"""Ctrl-G writes what stands on the line to a file."""

PATIENCE = 20.0


@contextmanager
def shell(name: str, folder: Path) -> Iterator[Callable[[str], str]]:
    """A function that types words and a tab into a shell in `folder`, and returns its line then."""
    binary = shutil.which(name)
    if binary is None:
        pytest.skip(f"{name} is not installed")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs, "HOME": str(folder), "TERM": "xterm", "HISTFILE": ""}
    line = folder / "line"
    child, end = pty.fork()
    if not child:
        os.chdir(folder)
        os.execve(binary, [binary, *STARTS[name]], environment)
    shown = ""

    def wait_for(there: Callable[[], bool], what: str) -> None:
        nonlocal shown
        until = time.monotonic() + PATIENCE
        while not there():
            assert time.monotonic() < until, f"{name}: {what}\n{shown}"
            if select.select([end], [], [], 0.05)[0]:
                shown += os.read(end, 1 << 16).decode(errors="replace")

    def typed(words: str) -> str:
        line.unlink(missing_ok=True)
        os.write(end, f"{words}\t\a".encode())
        wait_for(line.is_file, "nothing was completed")
        wait_for(lambda: line.read_text() != "", "the line is empty")
        os.write(end, b"\x15")
        return line.read_text().rstrip("\n")

    try:
        wait_for(lambda: shown != "", "does not start")
        os.write(end, f"{SETS_UP[name].format(line=line)}; touch {line}.ready\n".encode())
        wait_for(Path(f"{line}.ready").is_file, "is not set up")
        yield typed
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(end)


@pytest.mark.parametrize("name", STARTS)
def test_a_shell_completes(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("bits = 4\n")
    compare = "anequant compare FOLDER --recipes"
    with shell(name, tmp_path) as typed:
        for words, expected in (
            ("anequant compl", "anequant completion "),
            ("anequant quantize FOLDER --recipe w4a4", "anequant quantize FOLDER --recipe w4a4kv4 "),
            ("anequant convert FOLDER --recipe min", "anequant convert FOLDER --recipe mine.toml "),
            ("anequant rotate FOLDER --r2 had", "anequant rotate FOLDER --r2 hadamard "),
            ("anequant rotate FOLDER --r2=had", "anequant rotate FOLDER --r2=hadamard "),
            (f"{compare} w4a4", f"{compare} w4a4kv4 "),
            (f"{compare} w8-ane,w4-nearest,w4a4", f"{compare} w8-ane,w4-nearest,w4a4kv4 "),
            (f"{compare}=w8-ane,w4a4", f"{compare}=w8-ane,w4a4kv4 "),
            (f"{compare} w8-ane,min", f"{compare} w8-ane,mine.toml "),
            (f"{compare} w4a4kv4,w4a4", f"{compare} w4a4kv4,w4a4"),
        ):
            assert typed(words) == expected
