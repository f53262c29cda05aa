"""What Apple's exporter for iOS makes of the bundled model, functions and files, and what exporting takes.

    python tools/measure/record_coreai_contract.py [--sources URL]

apple/coreai-models, at the commit that `anequant/targets/coreai/design.py` follows, is fetched from URL (or a
git folder) and run in an environment of its own, see `peer_environments.py`: with the model's tied head and
with a head of its own, with the embedding in float16 and in 8-bit integers. What Apple's runtime says of the
functions goes to tests/targets/coreai/apple_contract.json, which a test compares ours with, beside the files
and metadata of the bundle. Seconds and peak memory go to docs/measured/coreai_export.json.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from measured import REPOSITORY, RESULTS, machine, when_and_where, write_json
from peer_environments import CACHE, COREAI_MODELS, OwnPeer, make_environment, run_peer

# Only the standard library up here: a child's ru_maxrss starts at the size of the process it came from.

SOURCES = "https://github.com/apple/coreai-models"
COMMIT = "86b363dca67cf276c1a5c96eea5e4b57e3a0643c"
EXPORTER = "python/src/coreai_models/export/ios.py"
MODEL = REPOSITORY / "anequant" / "bundled" / "tiny-qwen2"
CONTRACT = REPOSITORY / "tests" / "targets" / "coreai" / "apple_contract.json"
CONTEXT = 512
TABLES = {"float16": (), "int8": ("--int8-table",)}
HEADS = {True: (), False: ("--untie",)}
"""Options by whether the head is tied."""

COMMON = (
    "packages",
    "asked_for",
    "changes",
    "configuration",
    "settings",
    "ladder",
    "smallest_context",
    "constraints",
    "bundle",
)
"""What does not depend on head and table."""


def fetch_sources(place: str, folder: Path) -> None:
    """Write the sources of Apple's exporter to a folder, from a URL or a git folder.

    Raises CalledProcessError where the commit is not there.
    """
    source = str(Path(place).resolve()) if Path(place).is_dir() else place
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "fetch", "--quiet", "--depth", "1", source, COMMIT], check=True)
    subprocess.run([*git, "checkout", "--quiet", COMMIT, "--", "python"], check=True)


def export(python: Path, sources: Path, work: Path) -> list[dict[str, Any]]:
    """Export the model in every form; return what the peer tells of each."""
    found = []
    for tied, head in HEADS.items():
        for table, quantized in TABLES.items():
            options = ("--context", str(CONTEXT), *head, *quantized)
            peer = OwnPeer(COREAI_MODELS, "coreai_models_peer.py", options)
            output = work / f"{'tied' if tied else 'untied'}-{table}"
            found.append(run_peer(python, peer, MODEL, sources, output) | {"table": table})
            assert found[-1]["tied"] == tied
    return found


def make_record(exports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what does not depend on the machine: what is the same in all exports once."""
    common = {name: exports[0][name] for name in COMMON}
    assert all(export[name] == value for export in exports for name, value in common.items())
    return {
        "repository": SOURCES,
        "commit": COMMIT,
        "exporter": EXPORTER,
        "model": MODEL.name,
        "dtype": "float16",
        "max_context_length": CONTEXT,
        **common,
        "exports": [
            {name: export[name] for name in ("tied", "table", "helpers", "functions")} for export in exports
        ],
    }


def sentence(measured: dict[str, Any]) -> str:
    seconds, cpu = ([export[name] for export in measured["exports"]] for name in ("seconds", "cpu_seconds"))
    peak = max(export["peak"] for export in measured["exports"])
    packages = measured["packages"]
    return (
        f"Apple's exporter for iOS (coreai-models {measured['commit'][:7]}, coreai-core "
        f"{packages['coreai-core']}, coreai-torch {packages['coreai-torch']}) takes {min(seconds):.0f} to "
        f"{max(seconds):.0f} s ({min(cpu):.0f} to {max(cpu):.0f} s of CPU) and {peak / 1e9:.2f} GB for "
        f"`{measured['model']}` in float16, without compression of weights, for a context of "
        f"{measured['context']}. {when_and_where(measured['machine'])}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sources", default=SOURCES, help="URL or git folder of apple/coreai-models.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="The folder of the peer's environment.")
    parser.add_argument("--contract", type=Path, default=CONTRACT)
    parser.add_argument("--json", type=Path, default=RESULTS / "coreai_export.json")
    options = parser.parse_args()
    python = make_environment(COREAI_MODELS, options.cache)
    with tempfile.TemporaryDirectory() as work:
        sources = Path(work) / "sources"
        sources.mkdir()
        fetch_sources(options.sources, sources)
        exports = export(python, sources, Path(work))
    write_json(options.contract, make_record(exports))
    measured = {
        "model": MODEL.name,
        "commit": COMMIT,
        "context": CONTEXT,
        "packages": exports[0]["packages"],
        "exports": [
            {name: export[name] for name in ("tied", "table", "seconds", "cpu_seconds", "peak")}
            for export in exports
        ],
        "machine": machine(("anequant",)),
    }
    write_json(options.json, measured)
    print(sentence(measured))


if __name__ == "__main__":
    main()
