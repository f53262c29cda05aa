"""The rules of docs/architecture.md: layers, sizes, names, who may print or touch files, a quick --help."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from running import execute_python

import anequant
from anequant.recipe import Recipe
from anequant.recipe_files import load_recipe, named_recipes

PACKAGE = Path(anequant.__file__).parent
CONFIGS = PACKAGE.parent / "configs"
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in MODULES}
LAYERS = (
    ("errors", "strict", "recipe", "recipe_files", "lower_options", "units", "versions"),
    ("architectures",),
    ("rotation",),
    ("quantization",),
    ("jobs",),
    ("checkpoints",),
    ("reference",),
    ("calibration",),
    ("request",),
    ("targets.shared",),
    ("targets.coreml", "targets.coreai"),
    ("runtime",),
    ("evaluation",),
    ("verification",),
    ("outputs",),
    ("pipeline",),
    ("inspection", "comparison", "compat", "doctor"),
    ("report",),
    ("api",),
    ("cli",),
    ("", "__main__"),
)
"""Folders and modules; each imports those of layers above it in this table, and itself."""

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
ACROSS = ("attacks", "dev", "system")
"""Folders of tests that cross those of the package."""

MOST_LINES, MOST_FILES, LARGEST_SHARE, MOST_PARAMETERS = 300, 20, 0.15, 7


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)}"


def module_of(path: Path) -> str:
    """The dotted name of a module below the package; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_of(path): path for path in MODULES}


def unit_of(module: str) -> str:
    """The member of a layer that a module belongs to: the longest beginning of its name that is one."""
    parts = module.split(".")
    return next((unit for n in (3, 2, 1) if (unit := ".".join(parts[:n])) in RANKS), module)


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every module that a module names in an import, wherever in the file, with the node that does."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path, node)}: a relative import hides its layer"
            assert node.module is not None
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call, with the dotted name of what is called as it is written."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def internal_edges() -> Iterator[tuple[str, str, str]]:
    """(place, importing module, imported module) for every import of the package by itself, by name too."""
    for path in MODULES:
        found = [(node, name) for node, name in imports(path) if name.split(".")[0] == "anequant"]
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                whole = re.fullmatch(r"anequant((\.\w+)+)", node.value)
                if whole and whole[1][1:] in NAMES:
                    found.append((node, node.value))
        for node, name in found:
            module = name.removeprefix("anequant").removeprefix(".")
            if module not in NAMES:
                module = module.rpartition(".")[0]
            yield where(path, node), module_of(path), module


def test_every_module_has_its_layer() -> None:
    packages = {"targets"}
    assert {unit_of(module) for module in NAMES} - packages == set(RANKS)


def test_imports_go_downward_only() -> None:
    edges = list(internal_edges())
    assert len(edges) > 500
    ranks = [(place, low, RANKS[unit_of(high)], RANKS[unit_of(low)]) for place, high, low in edges]
    assert [
        f"{place} imports {low}" for place, low, high_rank, low_rank in ranks if high_rank < low_rank
    ] == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in NAMES}
    for _, importing, imported in internal_edges():
        if importing not in ("", imported) and not importing.startswith(f"{imported}."):
            graph[importing].add(imported)
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(order) == set(NAMES)


def test_folders_are_of_a_size_to_look_over() -> None:
    folders: dict[Path, list[Path]] = {}
    for path in MODULES:
        folders.setdefault(path.parent, []).append(path)
    crowded = {str(folder): len(files) for folder, files in folders.items() if len(files) > MOST_FILES}
    assert crowded == {}
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    shares = {
        str(folder): sum(lines[file] for file in files) / sum(lines.values())
        for folder, files in folders.items()
    }
    assert {folder: share for folder, share in shares.items() if share > LARGEST_SHARE} == {}


def test_no_two_modules_have_the_same_name() -> None:
    stems = Counter(path.stem for path in MODULES if path.stem != "__init__")
    assert [stem for stem, count in stems.items() if count > 1] == []


def test_tests_lie_in_the_folders_of_what_they_test() -> None:
    tests = PACKAGE.parent / "tests"
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    across = {folder for folder in folders if folder.parts and folder.parts[0] in ACROSS}
    assert {folder.as_posix() for folder in across} == set(ACROSS)
    assert {folder.as_posix() for folder in folders - across if not (PACKAGE / folder).is_dir()} == set()


def test_functions_take_at_most_seven_parameters() -> None:
    """The public API and click's commands excepted, which hand one request on."""
    long = [
        f"{where(path, node)} {node.name}"
        for path in MODULES
        if unit_of(module_of(path)) not in ("api", "cli")
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef) and len(parameters(node)) > MOST_PARAMETERS
    ]
    assert long == []


def parameters(node: ast.FunctionDef) -> list[str]:
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


def test_only_coreml_imports_coremltools() -> None:
    users = {
        unit_of(module_of(path))
        for path in MODULES
        for _, name in imports(path)
        if name.split(".")[0] == "coremltools"
    }
    assert users == {"targets.coreml"}


def test_only_the_console_prints() -> None:
    printing = {
        where(path, node)
        for path in MODULES
        if module_of(path) != "cli.console"
        for node, name in calls(path)
        if name in ("print", "click.echo", "click.secho", "echo", "secho", "pprint", "pprint.pprint")
    }
    streams = {
        where(path, node)
        for path in MODULES
        if module_of(path) != "cli.console"
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")
    }
    assert printing | streams == set()


@pytest.mark.parametrize("folder", ["rotation", "quantization"])
def test_tensor_functions_touch_no_file(folder: str) -> None:
    modules = [path for path in MODULES if unit_of(module_of(path)) == folder]
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
    result = execute_python(script)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.strip() == "[]"
