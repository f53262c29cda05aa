"""Draw which folder of the package imports which, and follow a checkpoint, in docs/architecture.md.

    python tools/draw_architecture.py           writes both into the page
    python tools/draw_architecture.py --check   exits with 1 where the page says something else

The drawing leaves out an arrow that others imply. The walk is that of `anequant quantize` on the bundled
model with w4-nearest: the functions that get the float checkpoint as an argument, each once, in the order in
which they first do.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import networkx

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "anequant"
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("targets.shared", "targets.coreml")
"""Folders that are drawn by themselves although they lie in another."""


def folder_of(module: str) -> str:
    """Return the folder that a dotted module below the package is drawn in; a single file by its own name."""
    for folder in FOLDERS:
        if module == folder or module.startswith(f"{folder}."):
            return folder
    return module.partition(".")[0]


def find_edges() -> set[tuple[str, str]]:
    """Return (importing, imported) for every two folders of the package."""
    edges = set()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        importing = folder_of(".".join(part for part in parts if part != "__init__"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("anequant."):
                names = [node.module.removeprefix("anequant.")]
            elif isinstance(node, ast.ImportFrom) and node.module == "anequant":
                names = [alias.name for alias in node.names]
            else:
                continue
            edges |= {(importing, folder_of(name)) for name in names}
    folders = {low for _, low in edges if (PACKAGE / low.replace(".", "/")).is_dir()}
    return {(high, low) for high, low in edges if high and high != low and low in folders}


def draw() -> str:
    """Return the drawing as a Mermaid graph, which GitHub shows."""
    edges = [edge for edge in find_edges() if (PACKAGE / edge[0].replace(".", "/")).is_dir()]
    kept = sorted(networkx.transitive_reduction(networkx.DiGraph(edges)).edges)
    names = {name: name.replace(".", "_") for edge in kept for name in edge}
    lines = [f"    {names[name]}[{name.replace('.', '/')}]" for name in sorted(names)]
    lines += [f"    {names[high]} --> {names[low]}" for high, low in kept]
    return "\n".join(["```mermaid", "graph TD", *lines, "```"])


def follow() -> str:
    """Return the functions that a float checkpoint passes through, as a numbered list."""
    from anequant.checkpoints.reader import Checkpoint
    from anequant.checkpoints.source import resolve_source
    from anequant.pipeline.quantize import quantize
    from anequant.recipe_files import load_recipe
    from anequant.request import Request

    passed: dict[str, None] = {}

    def look(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or str(PACKAGE) not in code.co_filename:
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = [frame.f_locals.get(name) for name in names if name != "self"]
        given += getattr(frame.f_locals.get("self"), "__dict__", {}).values()
        if any(isinstance(value, Checkpoint) for value in given):
            passed.setdefault(name_of(frame), None)

    def name_of(frame: FrameType) -> str:
        place = Path(frame.f_code.co_filename).relative_to(PACKAGE).with_suffix("").as_posix()
        owner = f"{type(frame.f_locals['self']).__name__}." if "self" in frame.f_locals else ""
        return f"{place}: {owner}{frame.f_code.co_name}"

    request = Request(resolve_source(None), load_recipe("w4-nearest"))
    with tempfile.TemporaryDirectory() as scratch:
        sys.setprofile(look)
        try:
            quantize(request, Path(scratch) / "out")
        finally:
            sys.setprofile(None)
    return "\n".join(f"{number}. `{name}`" for number, name in enumerate(passed, 1))


def put(text: str, name: str, content: str) -> str:
    """Return the page with the part between its marks replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    found = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)
    assert found[1] == 1, f"{PAGE} has no marks for {name}"
    return found[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = put(put(before, "drawing", draw()), "walk", follow())
    if not arguments.check:
        PAGE.write_text(after, encoding="utf-8")
    return int(arguments.check and after != before)


if __name__ == "__main__":
    sys.exit(main())
