"""Peers whose needs clash with anequant's: each has an environment of its own, made once and kept in a cache.

A peer is a script beside this one, run by its environment's interpreter:

    python SCRIPT MODEL TOKENS OUTPUT [--float FOLDER] [OPTIONS]

MODEL is a float model's folder and TOKENS a JSON file of token windows; it writes what it makes to OUTPUT,
with --float also as a folder of float weights, and prints what it measured as a line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CACHE = Path.home() / ".cache" / "anequant-peers"
MADE = "made.json"


class PeerError(Exception):
    """Why an environment cannot be made, or what a peer ended with: a line."""


@dataclass(frozen=True)
class Environment:
    """The packages of a peer with their versions.

    `before` are installed first, and seen by the builds of `packages`, which else have environments of their
    own. `variables` are set while packages are built.
    """

    name: str
    packages: tuple[str, ...]
    before: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A name that changes with anything that decides what is installed."""
        words = json.dumps([asdict(self), sys.version], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"


GPTQMODEL = Environment(
    "gptqmodel",
    ("gptqmodel==7.6.0", "torch==2.13.0", "transformers==5.23.0"),
    ("torch==2.13.0", "numpy==2.2.6", "packaging==26.4", "setuptools==84.2.1", "wheel==0.48.0"),
    {"BUILD_CUDA_EXT": "0"},
)
LLAMA_CPP = Environment(
    "llama-cpp",
    ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.2.6", "safetensors==0.8.0"),
    variables={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF"},
)
COREAI_MODELS = Environment(
    "coreai-models",
    (
        "coreai-core==1.0.0b3",
        "coreai-torch==0.4.3",
        "coreai-opt==0.4.0",
        "torch==2.13.0",
        "transformers==5.23.0",
    ),
)


@dataclass(frozen=True)
class OwnPeer:
    """A peer with an environment of its own: its script, and the options that are told to it."""

    environment: Environment
    script: str
    options: tuple[str, ...] = ()


def make_environment(environment: Environment, cache: Path = CACHE) -> Path:
    """Make an environment unless it is there; return its interpreter. Raises PeerError."""
    folder = cache / environment.key
    python = folder / "bin" / "python"
    if (folder / MADE).is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _call([sys.executable, "-m", "venv", folder])
    if environment.before:
        _call([*install, *environment.before])
        install.append("--no-build-isolation")
    _call([*install, *environment.packages], environment.variables)
    (folder / MADE).write_text(json.dumps(asdict(environment), indent=1) + "\n", encoding="utf-8")
    return python


def run_peer(python: Path, peer: OwnPeer, *words: object) -> dict[str, Any]:
    """Run a peer's script in a folder that is thrown away, as is what it leaves in the place for temporary
    files; return what it measured. Raises PeerError when it fails."""
    named = [word.absolute() if isinstance(word, Path) else word for word in words]
    command = [python.absolute(), Path(__file__).parent / peer.script, *named, *peer.options]
    with tempfile.TemporaryDirectory() as scratch:
        printed = _call(command, {"TMPDIR": scratch}, Path(scratch))
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def _call(command: list[Any], variables: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    """Run a command in a folder; return what it printed. Raises PeerError with the last error told."""
    words = [str(word) for word in command]
    env = {**os.environ, **(variables or {})}
    ran = subprocess.run(words, env=env, cwd=folder, capture_output=True, encoding="utf-8", check=False)
    if ran.returncode:
        lines = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
        errors = (
            [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {ran.returncode}"]
        )
        raise PeerError(errors[-1])
    return ran.stdout
