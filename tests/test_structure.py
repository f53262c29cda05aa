"""The structural rules of design.md, section 3: layers, who may print, who may touch files, quick --help."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import anequant
from anequant.recipe import Recipe
from anequant.recipe_files import load_recipe, named_recipes

PACKAGE = Path(anequant.__file__).parent
CONFIGS = PACKAGE.parent / "configs"
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in MODULES}
LAYERS = (
    ("errors", "strict", "recipe", "recipe_files", "tasks", "progress", "interrupts"),
    ("architectures",),
    ("rotation", "quantization"),
    ("checkpoints", "calibration"),
    ("coreml", "runtime", "evaluation"),
    ("pipeline",),
    ("report",),
    ("api",),
    (
        "estimate",
        "live",
        "console",
        "cli_options",
        "cli_completion",
        "cli_batch",
        "cli_compare",
        "cli_ending",
        "cli_inspect",
        "cli_jobs",
        "cli_plan",
        "cli_push",
        "cli_report",
        "cli_scheduler",
        "cli",
    ),
    ("__init__", "__main__"),
)
RANKS = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
FILE_MODULES = {"pathlib", "os", "io", "json", "shutil", "safetensors", "tempfile", "glob"}
HEAVY = ("torch", "coremltools", "transformers")
COMMANDS = (
    "batch",
    "compare",
    "convert",
    "eval",
    "generate",
    "lower",
    "plan",
    "push",
    "quantize",
    "rotate",
    "verify",
)
MOST_LINES = 260


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)}"


def unit_of(path: Path) -> str:
    """The layer member a module belongs to: its top folder, or its own name beside the folders."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every module that a module names in an import, wherever in the file, with the node that does."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path, node)}: a relative import hides its layer"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node, name) for name in (names if node.module == "anequant" else [node.module]))


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call, with the dotted name of what is called as it is written."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def internal_edges() -> Iterator[tuple[str, str, str]]:
    """(place, importing unit, imported unit) for every import between two units of the package."""
    for path in MODULES:
        for node, name in imports(path):
            parts = name.split(".")
            if parts[0] == "anequant" and len(parts) > 1 and parts[1] != unit_of(path):
                yield where(path, node), unit_of(path), parts[1]


def test_every_module_has_its_layer() -> None:
    units = {unit_of(path) for path in MODULES}
    assert units == set(RANKS)


def test_imports_go_downward_only() -> None:
    edges = list(internal_edges())
    assert len(edges) > 50
    upward = [f"{place} imports {low}" for place, high, low in edges if RANKS[high] < RANKS[low]]
    assert upward == []


def test_packages_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {unit: set() for unit in RANKS}
    for _, importing, imported in internal_edges():
        graph[importing].add(imported)
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(order) == set(RANKS)


def test_only_coreml_imports_coremltools() -> None:
    users = {
        unit_of(path) for path in MODULES for _, name in imports(path) if name.split(".")[0] == "coremltools"
    }
    assert users == {"coreml"}


def test_only_the_console_prints() -> None:
    printing = {
        where(path, node)
        for path in MODULES
        if path.name != "console.py"
        for node, name in calls(path)
        if name in ("print", "click.echo", "click.secho", "echo", "secho", "pprint", "pprint.pprint")
    }
    streams = {
        where(path, node)
        for path in MODULES
        if path.name != "console.py"
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")
    }
    assert printing | streams == set()


@pytest.mark.parametrize("folder", ["rotation", "quantization"])
def test_tensor_functions_touch_no_file(folder: str) -> None:
    modules = [path for path in MODULES if unit_of(path) == folder]
    assert modules
    found = [
        f"{where(path, node)} imports {name}"
        for path in modules
        for node, name in imports(path)
        if name.split(".")[0] in FILE_MODULES
    ]
    found += [where(path, node) for path in modules for node, name in calls(path) if name == "open"]
    assert found == []


def test_nothing_from_a_checkpoint_can_run() -> None:
    found = [
        f"{where(path, node)} calls {name}"
        for path in MODULES
        for node, name in calls(path)
        if name in ("eval", "exec", "torch.load", "np.load", "numpy.load", "__import__")
    ]
    found += [
        f"{where(path, node)} imports {name}"
        for path in MODULES
        for node, name in imports(path)
        if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
    ]
    found += [
        f"{where(path, node)} trusts remote code"
        for path in MODULES
        for node, _ in calls(path)
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
    ]
    assert found == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_fits_on_a_few_screens(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_every_config_loads_by_path_and_by_name(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert isinstance(recipe, Recipe)
    assert load_recipe(path.stem) == recipe
    assert named_recipes()[path.stem] == path


def test_help_imports_nothing_heavy() -> None:
    script = f"""
import contextlib, io, sys
from anequant.cli import main
for args in [["--help"], *([command, "--help"] for command in {COMMANDS})]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = main(args, standalone_mode=False)
    assert code == 0 and "Usage:" in shown.getvalue(), (args, code, shown.getvalue())
print(sorted(name for name in {HEAVY} if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == "[]"
