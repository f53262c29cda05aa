"""Apple's runtime in a process of its own, and what is told when it aborts, crashes or hangs."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from anequant.errors import VerificationError
from anequant.targets.coreai.design import FunctionPorts
from anequant.targets.coreai.installed import require_installed
from anequant.targets.coreai.messages import Array, receive, send
from anequant.targets.coreai.worker import RUN
from anequant.targets.coreai.worker_process import LAST_WORDS, make_command, tell_ending

LONGEST = 1800.0
"""Seconds after which a call counts as hanging: 64 tokens of a 0.5B take two minutes."""


class Runner:
    """An asset that runs in a process until the block ends.

    Raises UnsupportedError where Core AI is not installed, and VerificationError where the process ends on
    its own, says that something is wrong, or does not answer in LONGEST seconds; it is gone then.
    """

    def __init__(self, asset: Path, longest: float = LONGEST) -> None:
        require_installed()
        self._asset, self._longest = asset, longest
        self._words = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            make_command(RUN, asset),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
        )
        self.functions: list[str] = self._exchange("loading", None, {})[0]["functions"]

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process; it holds nothing that has to be saved."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._words):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def run(
        self,
        ports: FunctionPorts,
        inputs: Mapping[str, Array],
        kept: Mapping[str, str] | None = None,
        keep: Sequence[str] = (),
    ) -> dict[str, Array]:
        """Run a function; return its outputs but for those to `keep` in the process.

        `kept` are inputs by name that are outputs of that name, kept from earlier runs.
        """
        states = {port.name: list(port.shape) for port in ports.states}
        dtype = ports.states[0].dtype if states else "float16"
        order = {"run": ports.name, "kept": kept or {}, "keep": list(keep), "states": states, "dtype": dtype}
        return self._exchange(ports.name, order, inputs)[1]

    def describe(self, name: str) -> dict[str, Any]:
        """A function's inputs, states and outputs, each a list of names, dtypes and shapes."""
        return self._exchange(name, {"describe": name}, {})[0]

    def forget(self) -> None:
        """Let every state begin as zeros again."""
        self._exchange("states", {"forget": True}, {})

    def _exchange(
        self, what: str, order: Mapping[str, Any] | None, arrays: Mapping[str, Array]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Send an order, if there is one, and wait for the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Event()
        watch = threading.Timer(self._longest, self._give_up, (late,))
        watch.start()
        try:
            if order is not None:
                send(self._process.stdin, order, arrays)
            answer, outputs = receive(self._process.stdout)
        except (OSError, EOFError) as error:
            raise self._say_ended(what, late.is_set()) from error
        finally:
            watch.cancel()
        if "error" in answer:
            self.close()
            raise self._fail(
                f"Apple's runtime refuses {what}: {answer['error'].splitlines()[0][:LAST_WORDS]}"
            )
        return answer, outputs

    def _give_up(self, late: threading.Event) -> None:
        late.set()
        self._process.kill()

    def _say_ended(self, what: str, late: bool) -> VerificationError:
        if late:
            self.close()
            return self._fail(f"Apple's runtime did not answer within {self._longest:g} s in {what}")
        code = self._process.wait()
        self._words.seek(0)
        told = tell_ending(code, f"in {what}", self._words.read())
        self.close()
        return self._fail(f"Apple's runtime {told}")

    def _fail(self, what: str) -> VerificationError:
        remedy = "nothing that was written is lost; lower the checkpoint again if the asset is damaged"
        return VerificationError(what, where=str(self._asset), remedy=remedy)
