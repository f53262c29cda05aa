"""What surrounds a process: folders it may not write to, Ctrl-C while it starts, other encodings, -OO."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from running import execute_python, invoke

from anequant import doctor
from anequant.doctor import OK, WARNING
from anequant.errors import INTERRUPTED, UnsupportedError, UsageError
from anequant.jobs import resume
from anequant.jobs.interrupts import NOTHING_LEFT
from anequant.quantization import kernels

NOWHERE = "/dev/null/home"
"""A folder that nobody can make, root neither."""

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
COMMAND = "from anequant.__main__ import main; main()"

NO_TEXT = "bad\udcff"
"""What Python makes of an argument with the byte 0xff in it."""


# --- nothing below HOME, and nothing beside the modules ---------------------------------------------------


UNWRITABLE = """
import os
from numba.core import caching
made = caching.InTreeCacheLocator.ensure_cache_path
def refuse(self):
    raise PermissionError(13, "Permission denied")
caching.InTreeCacheLocator.ensure_cache_path = refuse
import torch
from anequant.quantization import kernels
from anequant.quantization.codebook_kernels import count_values
assert kernels.cache_folder() == os.environ.get("EXPECTED"), kernels.cache_folder()
print(count_values(torch.tensor([0.1, 0.6, 0.7]), 2, 0.0, 1.0).tolist())
"""


def test_loops_are_compiled_where_no_folder_can_keep_them(tmp_path: Path) -> None:
    kept = {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE, "NUMBA_CACHE_DIR": ""}
    ran = execute_python(UNWRITABLE, folder=tmp_path, env=kept)
    assert (ran.exit_code, ran.stdout) == (0, "[1.0, 2.0]\n"), ran.stderr


def test_doctor_tells_whether_loops_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    (kept,) = doctor.check_compiled_loops()
    assert (kept.status, kept.detail) == (OK, f"kept in {kernels.cache_folder()}")
    monkeypatch.setattr(kernels, "cache_folder", lambda: None)
    (check,) = doctor.check_compiled_loops()
    assert check.status == WARNING and "every run compiles" in check.detail
    assert "NUMBA_CACHE_DIR" in check.remedy


def test_a_job_tells_that_its_loops_are_not_kept(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "cache_folder", lambda: None)
    model = make_model(tmp_path / "model", "qwen2", False)
    arguments = ["quantize", str(model), "-o", str(tmp_path / "out"), "--recipe", "w4-nearest"]
    result = invoke(*arguments)
    assert result.exit_code == 0 and f"{resume.UNCACHED}\n" in result.stderr


def test_a_conversion_without_a_home_in_an_ascii_locale(tmp_path: Path) -> None:
    """Nothing else is written below a home, and nothing is read or written in the locale's encoding."""
    words = ("convert", "-o", "out", "--recipe", "w4-nearest")
    homes = {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE, "XDG_CONFIG_HOME": NOWHERE}
    ran = execute_python(COMMAND, *words, folder=tmp_path, env={**homes, **ASCII})
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout.isascii() and {path.name for path in tmp_path.iterdir()} == {"out"}


# --- Ctrl-C while modules are imported --------------------------------------------------------------------


PRESSED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored
name = sys.argv.pop(1)
class Press:
    def find_spec(self, found, path=None, target=None):
        if found == name:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
from anequant.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["click", "torch", "transformers"])
def test_ctrl_c_at_an_import(tmp_path: Path, module: str) -> None:
    """By the first one the command is not known yet, by the last one the job has begun."""
    ran = execute_python(PRESSED, module, "convert", "-o", "out", "--recipe", "w4-nearest", folder=tmp_path)
    assert ran.exit_code == INTERRUPTED, ran.stderr
    assert ran.stderr.splitlines()[-1] == NOTHING_LEFT
    assert not list(tmp_path.iterdir())


SWALLOWED = """
import os, signal, sys
from pathlib import Path
Path("greedy.py").write_text('''
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
except BaseException:
    print("swallowed")
''')
sys.path.insert(0, "")
from anequant.jobs.interrupts import between_imports, leave, leave_until_begun
handlers = {"ignored": signal.SIG_IGN, "default": signal.default_int_handler}
signal.signal(signal.SIGINT, handlers[sys.argv[1]])
leave_until_begun()
try:
    with between_imports():
        import greedy
        import time; time.sleep(1)
        print("to the end")
except KeyboardInterrupt:
    print("interrupted")
os.kill(os.getpid(), signal.SIGINT)
print("after")
"""


@pytest.mark.parametrize(("handled", "said"), [("default", "interrupted"), ("ignored", "to the end")])
def test_an_interrupt_waits_for_the_end_of_an_import(tmp_path: Path, handled: str, said: str) -> None:
    """A process that nohup started ignores it; what has ended cannot be interrupted."""
    ran = execute_python(SWALLOWED, handled, folder=tmp_path)
    assert (ran.exit_code, ran.stdout.split("\n")[:2]) == (0, [said, "after"]), ran.stderr


# --- encodings, and -OO -----------------------------------------------------------------------------------


def test_an_ascii_terminal_gets_escapes(tmp_path: Path) -> None:
    said = "import sys; from anequant.cli.console import *; escape_what_has_no_code()\n"
    said += (
        "Console().result({}, [('a', '5 \\u00b1 1')]); Console(json=True).result({'a': '5 \\u00b1 1'}, [])"
    )
    ran = execute_python(said, folder=tmp_path, env=ASCII)
    assert ran.stdout.isascii()
    rows, values = ran.stdout.splitlines()
    assert rows == r"a  5 \xb1 1" and json.loads(values) == {"a": "5 ± 1"}


def test_a_python_without_docstrings_is_named(tmp_path: Path) -> None:
    ran = execute_python(COMMAND, "convert", "-o", "out", folder=tmp_path, env={"PYTHONOPTIMIZE": "2"})
    assert ran.exit_code == UnsupportedError.exit_code
    assert "docstrings (-OO" in ran.stderr and "unset PYTHONOPTIMIZE" in ran.stderr
    assert "config.json" not in ran.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("generate", ".", "--prompt", NO_TEXT),
        ("chat", ".", "--system", NO_TEXT),
        ("quantize", NO_TEXT, "-o", "out"),
        ("quantize", ".", "-o", NO_TEXT),
        ("quantize", ".", "-o", "out", "--calib", NO_TEXT),
        ("lower", ".", "-o", "out", "--prefix", NO_TEXT),
        ("eval", ".", "--text", NO_TEXT),
        ("compare", ".", "--recipes", NO_TEXT),
    ],
)
def test_an_argument_that_is_no_utf8_is_refused(words: tuple[str, ...]) -> None:
    result = invoke(*words)
    assert result.exit_code == UsageError.exit_code, result.stderr
    assert r"error: 'bad\udcff' is not UTF-8" in result.stderr and "Traceback" not in result.stderr
