"""A headless Chromium, driven through its DevTools protocol; for tests of pages."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
PATIENCE = 60.0


class Page:
    """One page; `events` are what it told so far, by the protocol's names."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def open(self, url: str, *, width: int, dark: bool) -> None:
        """Load a page of that width in light or dark, and wait until it is there."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        phone = width < 600
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.events.clear()
        self.call("Page.navigate", url=url)
        until = time.monotonic() + PATIENCE
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < until, f"{url} does not load"
            self.evaluate("0")

    def evaluate(self, script: str) -> Any:
        """What an expression, or the promise that it is, ends as."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions."""
        texts = []
        for event in self.events:
            method, said = event["method"], event["params"]
            if method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
                texts.append(said["entry"]["text"])
            elif method == "Runtime.exceptionThrown":
                texts.append(str(said["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled":
                texts.append(str(said["args"]))
        return texts


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a Chromium of its own; the test is skipped where there is none."""
    websocket = pytest.importorskip("websocket", reason="needs websocket-client, of the extra dev")
    binary = next(filter(None, map(shutil.which, BINARIES)), None)
    if binary is None:
        pytest.skip(f"needs a browser on the path: one of {', '.join(BINARIES)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:  # its helpers outlive it
        told = Path(home) / "profile" / "DevToolsActivePort"
        process = subprocess.Popen(
            [binary, *QUIET, "--remote-debugging-port=0", f"--user-data-dir={told.parent}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": home},
        )
        try:
            until = time.monotonic() + PATIENCE
            while not told.is_file() or "\n" not in told.read_text():
                assert process.poll() is None and time.monotonic() < until, f"{binary} does not start"
                time.sleep(0.05)
            port = told.read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE) as answer:
                targets = json.load(answer)
            address = next(item["webSocketDebuggerUrl"] for item in targets if item["type"] == "page")
            socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
            try:
                yield Page(socket)
            finally:
                socket.close()
        finally:
            process.terminate()
            process.wait(PATIENCE)
