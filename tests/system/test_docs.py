"""README, CONTRIBUTING and docs/ say what the program does: every command runs, every key, file, tensor and
message that they name is there, and their examples give the numbers that they print.

Commands run in this process on the bundled model. What cannot run here is marked in the page by
`<!-- skip: reason -->`, and is listed as skipped with that reason.
"""

from __future__ import annotations

import dataclasses
import doctest
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import conftest
import pytest
import yaml
from running import succeed
from safetensors import safe_open

import anequant
from anequant import architectures
from anequant.architectures import ARCHITECTURES
from anequant.architectures.spec import Architecture
from anequant.checkpoints.manifest import read_manifest
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import BUNDLED_MODEL, SAMPLE_TEXT
from anequant.cli import main
from anequant.cli.options import read_recipe
from anequant.cli.target_options import read_lowering
from anequant.errors import AnequantError
from anequant.lower_options import LowerOptions, Targets
from anequant.recipe import Recipe
from anequant.recipe_files import load_recipe, named_recipes, recipe_from_dict
from anequant.strict import parse_toml
from anequant.targets.coreai.installed import find_problem
from anequant.targets.coreml.interpreter.interpreter import Package

DOCS = conftest.REPOSITORY / "docs"
README, CONTRIBUTING = "../README.md", "../CONTRIBUTING.md"
PAGES = {path.name: path for path in sorted(DOCS.glob("*.md"))} | {
    README: conftest.REPOSITORY / "README.md",
    CONTRIBUTING: conftest.REPOSITORY / "CONTRIBUTING.md",
}
MAKEFILE = (conftest.REPOSITORY / "Makefile").read_text(encoding="utf-8")
LANGUAGES = {"mermaid", "sh", "toml", "python", "pycon", "text"}
QUICK = {"--calib-samples": "4", "--calib-length": "64", "--descent": "0", "--refinement": "0"}
SMALL = {"--context": "64", "--batch": "16"}
NO_COREAI = find_problem()
"""Options that commands get unless they say otherwise: those that calibrate, those that lower."""

BLOCK = re.compile(
    r"(?:<!-- skip: (?P<skip>[^>]+) -->\n)?^(?P<indent> *)```(?P<language>\S*)\n(?P<body>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
MESSAGE_ROW = re.compile(r"^\| `(?P<message>[^`]+)` \|", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    body: str
    skip: str | None

    @property
    def commands(self) -> list[list[str]]:
        lines = [shlex.split(line, comments=True) for line in self.body.replace("\\\n", " ").splitlines()]
        return [words for words in lines if words]


def blocks(page: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(PAGES[page].read_text(encoding="utf-8")):
        body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
        found.append(Block(page, match["language"], body, match["skip"]))
    return found


def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


SKIPPED = [block for page in PAGES for block in blocks(page) if block.skip]
RUN = [page for page in PAGES if any(block.language == "sh" and not block.skip for block in blocks(page))]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of the pages: the bundled model, converted once."""
    output = tmp_path_factory.mktemp("docs") / "OUT"
    words = ["convert", str(BUNDLED_MODEL), "-o", str(output), "--recipe", "w4-nearest"]
    succeed(*words, *(word for pair in SMALL.items() for word in pair), "--quiet")
    return output


def placed(text: str, output: Path) -> str:
    """The page's placeholders as folders of this machine."""
    places = {
        "MODEL": BUNDLED_MODEL,
        "OUT": output,
        "CHECKPOINT": output / "checkpoint",
        "PACKAGES": output / "packages",
    }
    return re.sub(r"\b(MODEL|OUT|CHECKPOINT|PACKAGES)\b", lambda match: str(places[match[0]]), text)


# Blocks


def test_every_block_is_of_a_known_kind() -> None:
    for page in PAGES:
        found = blocks(page)
        fences = sum(line.lstrip().startswith("```") for line in text_of(page).splitlines())
        assert fences == 2 * len(found), f"{page}: a block that is not closed, or not seen"
        for block in found:
            assert block.language in LANGUAGES, f"{page}: ```{block.language}"


@pytest.mark.parametrize("page", RUN)
def test_every_command_runs(
    page: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(SAMPLE_TEXT, "sample.txt")
    left_out: list[str] = []
    for block in blocks(page):
        file = re.match(r"# (\S+\.toml)\n", block.body)
        if block.language == "toml" and file:
            Path(file[1]).write_text(placed(block.body, converted), encoding="utf-8")
        if block.language != "sh" or block.skip:
            continue
        for program, *words in block.commands:
            name = program.removeprefix(".venv/bin/")
            assert name == "anequant", f"{page}: {program} cannot be run here, say why"
            if NO_COREAI is not None and {"coreai", "bundle"} & set(words):
                left_out.append(" ".join(words))
                continue
            options: dict[str, str] = {}
            if words[0] in ("quantize", "convert"):
                options |= QUICK
            if words[0] in ("lower", "convert"):
                options |= {"--context": "256", "--ladder": "8"} if "coreai" in words else SMALL
            quiet = () if "--quiet" in words else ("--quiet",)
            extra = [word for pair in options.items() if pair[0] not in words for word in pair]
            succeed(*(placed(word, converted) for word in words), *extra, *quiet)
    if left_out:
        assert NO_COREAI is not None
        pytest.skip(f"{page}: all but {len(left_out)} commands ran: {NO_COREAI.what}")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))


@pytest.mark.parametrize(
    "block", SKIPPED, ids=lambda block: f"{block.page}: {' '.join(block.commands[0])[:60]}"
)
def test_what_cannot_run_here(block: Block) -> None:
    assert block.language == "sh"
    for program, *words in block.commands:
        if program == "anequant":
            assert words[0] in main.commands
        elif program.startswith("tools/"):
            assert (conftest.REPOSITORY / program).is_file()
        elif program == "make":
            assert words[0] in make_targets()
    pytest.skip(f"{block.page}: {block.skip}")


@pytest.mark.parametrize("page", [page for page in PAGES if "```pycon" in text_of(page)])
def test_examples_print_what_the_page_says(page: str) -> None:
    source = "\n".join(block.body for block in blocks(page) if block.language == "pycon")
    example = doctest.DocTestParser().get_doctest(source, {}, page, str(PAGES[page]), 0)
    assert len(example.examples) > 10
    said: list[str] = []
    failed, _ = doctest.DocTestRunner().run(example, out=said.append)
    assert failed == 0, "".join(said)


def test_python_of_the_formats_page_runs(converted: Path) -> None:
    (block,) = (block for block in blocks("file-formats.md") if block.language == "python")
    exec(compile(placed(block.body, converted), "file-formats.md", "exec"), {})


def test_python_of_the_readme_runs(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With packages of fewer tokens than it says: nothing else is small about the bundled model's."""
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks(README) if block.language == "python")
    scope: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr(anequant, "convert", partial(anequant.convert, context=64, batch=16))
        exec(compile(placed(block.body, converted), README, "exec"), scope)
    assert scope["model"].config.model_type == "qwen2"
    assert read_manifest(tmp_path / "converted")["recipe"]["head_bits"] == 6


# Words


def test_every_option_that_is_named_exists() -> None:
    known = {"--meta", "--work", "--model", "--report"}
    """Of the scripts that the pages name."""
    known |= {"--host", "--port", "--nthreads", "--nworkers", "--memory-limit"}
    """Of dask."""
    for command in main.commands.values():
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    known |= {"--help", "--version", "--key", "--no-key"}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text_of(page)))
        assert named <= known, f"{page}: {sorted(named - known)}"


def test_every_command_that_is_named_exists() -> None:
    for page in PAGES:
        named = set(re.findall(r"`anequant ([a-z]+)", text_of(page)))
        assert named <= set(main.commands), page
    assert isinstance(main, click.Group)


def test_every_make_target_that_is_named_exists() -> None:
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)", text_of(page))) <= make_targets(), page


def test_every_place_that_contributing_names_exists() -> None:
    named = re.findall(r"`((?:anequant|tests|tools|configs|docs)/[^`\s]*)`", text_of(CONTRIBUTING))
    assert len(named) > 15
    gone = [place for place in named if not (conftest.REPOSITORY / place).exists()]
    assert not gone


def test_links_lead_somewhere_and_every_page_is_listed() -> None:
    for page in PAGES:
        for target, place in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text_of(page)):
            path = PAGES[page].parent / target if target else PAGES[page]
            assert path.exists(), f"{page}: {target}"
            assert not place or place in anchors(path), f"{page}: {target}#{place}"
    listed = re.findall(r"^\d+\. \[.*?\]\((.*?)\)", text_of("README.md"), re.MULTILINE)
    assert sorted([*listed, "README.md"]) == sorted(path.name for path in DOCS.glob("*.md"))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_are_short() -> None:
    """Ten minutes at most: 2200 words beside the code, at 220 a minute. The results' tables are no text."""
    for page in set(PAGES) - {README}:
        text = re.sub("<!--.*?-->", "", BLOCK.sub("", text_of(page)))
        if page == "results.md":
            text = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
        assert len(text.split()) <= 2200, page


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 140
    assert len(text_of(README).encode()) <= 9000


def test_the_readme_has_every_guarantee_and_the_limits_that_stop_a_user() -> None:
    """Every heading of the guarantees is a line of the README, in the same words and order."""
    headings = re.findall(r"^## (.+)$", text_of("guarantees.md"), re.MULTILINE)
    assert re.findall(r"^\d\. \[(.+?)\]\(docs/guarantees\.md#", text_of(README), re.MULTILINE) == headings
    limits = re.findall(r"^- \*\*(.+?)\*\*", text_of(README).partition("## Limits")[2], re.MULTILINE)
    assert len(limits) == 3 and "Neural Engine" in limits[0]


def test_every_architecture_is_named() -> None:
    for page in (README, "limits.md"):
        assert all(f"`{name}`" in text_of(page) for name in ARCHITECTURES), page


def test_every_command_is_explained() -> None:
    listed = re.findall(r"^\| `anequant ([a-z]+)", text_of("commands.md"), re.MULTILINE)
    assert sorted(listed) == sorted(main.commands)


# Recipes


def test_every_recipe_key_is_explained_with_its_values_and_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", text_of("recipes.md"), re.MULTILINE))
    for field in dataclasses.fields(Recipe):
        values, default, _ = (cell.strip() for cell in rows[field.name].split(" | "))
        plain = field.default if isinstance(field.default, (bool, int, float)) else str(field.default)
        shown = f'"{plain}"' if field.name in ("mixed_bits", "activation_overrides") else str(plain)
        assert default == (shown.lower() if isinstance(plain, bool) else shown), field.name
        if field.metadata["choices"]:
            assert values.split(", ") == [str(choice) for choice in field.metadata["choices"]], field.name
        elif field.metadata["most"] and field.name != "seed":
            assert values.endswith(f" to {field.metadata['most']}"), field.name
    assert {key for key in rows if key not in named_recipes()} == {
        field.name for field in dataclasses.fields(Recipe)
    }


def test_every_named_recipe_is_explained() -> None:
    table = text_of("recipes.md").partition("## Every key")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == set(named_recipes())


def test_the_worked_recipes_are_recipes_and_no_two_alike() -> None:
    found = [
        recipe_from_dict(parse_toml(block.body)) for block in blocks("recipes.md") if block.language == "toml"
    ]
    assert len(set(found)) == 3
    assert not {load_recipe(name) for name in named_recipes()} & set(found)


# Formats


def written(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def test_every_file_that_is_written_is_named(converted: Path) -> None:
    page = text_of("file-formats.md")
    tokenizer = {"merges.txt", "vocab.json", "tokenizer_config.json"}
    """Stands as `tokenizer.json ...` there."""
    for name in written(converted):
        for part in name.replace("qwen25_", "PREFIX_").split("/"):
            assert part in page or part in tokenizer, name
    tree = next(block.body for block in blocks("file-formats.md") if block.language == "text")
    names = {name.replace("qwen25_", "PREFIX_") for name in written(converted)}
    folders = {parent.name for name in names for parent in Path(name).parents} | {"OUT"}
    for line in tree.splitlines():
        word = line.split()[0].rstrip("/")
        assert word in folders or any(Path(name).name == word for name in names), word


def test_every_tensor_and_its_shape_are_named(converted: Path) -> None:
    page = text_of("file-formats.md")
    rows = dict(re.findall(r"^\| `P\.(\w+)` \| \[(.*?)\]", page, re.MULTILINE))
    types = dict(re.findall(r"^\| `P\.(\w+)` \| \[.*?\] \| (\w+) \|", page, re.MULTILINE))
    checkpoint = open_checkpoint(converted / "checkpoint")
    spec, seen = checkpoint.spec, set()
    shapes = {linear.name: spec.shape(linear) for linear in spec.architecture.linears}
    with safe_open(converted / "checkpoint" / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            stored = file.get_slice(name)
            linear, _, part = re.sub(r"^model\.layers\.\d+\.", "", name).rpartition(".")
            if linear not in shapes:
                generic = re.sub(r"layers\.\d+", "layers.N", name)
                assert generic in page, name
                continue
            rows_, columns = shapes[linear]
            sizes = {"out": rows_, "in": columns, "1": 1, "2^bits": 16}
            assert tuple(stored.get_shape()) == tuple(sizes[word] for word in rows[part].split(", ")), name
            assert stored.get_dtype() == {"float16": "F16", "float32": "F32"}[types[part]], name
            seen.add(part)
    assert seen == set(rows)


def test_every_key_of_the_manifests_is_named(converted: Path) -> None:
    table = text_of("file-formats.md").partition("## anequant.json")[2].partition("## ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(row.split(" | ")[0] for row in table.splitlines())))
    for folder in (converted, converted / "checkpoint", converted / "packages"):
        assert set(json.loads((folder / "anequant.json").read_text(encoding="utf-8"))) <= named
    page = text_of("file-formats.md")
    checkpoint = converted / "checkpoint"
    for key in json.loads((checkpoint / "quantization_config.json").read_text(encoding="utf-8")):
        assert f"`{key}`" in page, key
    info = yaml.safe_load((converted / "packages" / "meta.yaml").read_text(encoding="utf-8"))["model_info"]
    for key in (*info, *info["parameters"]):
        assert key in page, key


def test_functions_inputs_outputs_and_state_are_named(converted: Path) -> None:
    page = text_of("file-formats.md")
    functions = set()
    for path in sorted((converted / "packages").glob("*.mlpackage")):
        for function, spec in Package.open(path).functions.items():
            functions.add(function)
            for tensor in (*spec.inputs, *spec.outputs, *spec.states):
                name = "logitsN" if re.fullmatch(r"logits\d+", tensor.name) else tensor.name
                assert name in page, (path.name, name)
    assert functions == {"main", "infer", "prefill"}
    assert all(f"`{name}`" in page for name in functions)
    for table in ARCHITECTURES.values():
        assert f"`{table.package_prefix}`" in page


def test_the_card_of_a_conversion_is_as_described(converted: Path) -> None:
    """Its front matter, its quality, and its command, which click reads as what was asked for."""
    text = (converted / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["base_model"] == "tiny-qwen2" and metadata["library_name"] == "anequant"
    assert {"coreml", "anequant", "quarot", "4-bit"} <= set(metadata["tags"])
    page = text_of("file-formats.md")
    assert all(f"`{key}`" in page for key in metadata if key != "base_model_relation")
    manifest = json.loads((converted / "anequant.json").read_text(encoding="utf-8"))
    assert {"README.md", "checkpoint/README.md"} <= set(manifest["files"])
    quality = manifest["measured"]["quality"]
    assert f"| {quality['kl']:.4f} |" in text and f"| {quality['perplexity']:.3f} " in text
    (command,) = re.findall(r"^anequant convert .*$", text, re.MULTILINE)
    _, verb, *words = shlex.split(command)
    with main.commands[verb].make_context(verb, words, click.Context(main)) as context:
        assert read_lowering(context.params) == Targets(LowerOptions(context=64, batch=16))
        assert read_recipe(context.params) == load_recipe("w4-nearest")


# Troubleshooting


def test_messages_are_the_programs_own() -> None:
    """A message is a line of the source, or two; what stands in the place of `...` may be anything."""
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in Path(anequant.__file__).parent.rglob("*.py")
    )
    messages = MESSAGE_ROW.findall(text_of("troubleshooting.md").partition("## The text is bad")[0])
    assert len(messages) >= 25
    for message in messages:
        pieces = [re.escape(piece.strip()) for piece in message.strip(". :").split("...")]
        assert re.search(r"[^\n]*(?:\n[^\n]*)?".join(pieces), sources), message


def test_exit_codes_are_the_programs_own() -> None:
    line = text_of("troubleshooting.md").partition("## ")[0]
    for kind in AnequantError.__subclasses__():
        assert f"{kind.exit_code} " in line, kind


# The worked architecture


def test_the_worked_architecture_is_exact(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's own code, in its order: the table, what conftest.py needs to know, and the test."""
    table, own, test = (block for block in blocks("adding-an-architecture.md") if block.language == "python")
    assert "seed_oss" not in ARCHITECTURES, "it is in the program: choose another example"
    scope: dict[str, Any] = {}
    exec(compile(table.body, "seed_oss.py", "exec"), scope)
    example: Architecture = scope["SEED_OSS"]
    monkeypatch.setitem(architectures.ARCHITECTURES, example.model_type, example)
    monkeypatch.setattr(conftest, "OWN", dict(conftest.OWN))
    exec(compile(own.body, "conftest.py", "exec"), scope)
    monkeypatch.setitem(make_model.__globals__, "OWN", conftest.OWN)
    exec(compile(test.body, "test_seed_oss.py", "exec"), scope)
    monkeypatch.chdir(tmp_path)
    scope["test_seed_oss_stays_exact"](make_model, tmp_path)


def test_a_table_without_a_bias_is_noticed(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's test has teeth: with o's bias left out of the table the model is refused."""
    table, own, test = (block for block in blocks("adding-an-architecture.md") if block.language == "python")
    wrong = table.body.replace('output_bias="attention_out_bias"', "output_bias=False")
    assert wrong != table.body
    scope: dict[str, Any] = {}
    exec(compile(wrong, "seed_oss.py", "exec"), scope)
    monkeypatch.setitem(architectures.ARCHITECTURES, "seed_oss", scope["SEED_OSS"])
    monkeypatch.setattr(conftest, "OWN", dict(conftest.OWN))
    exec(compile(own.body, "conftest.py", "exec"), scope)
    monkeypatch.setitem(make_model.__globals__, "OWN", conftest.OWN)
    exec(compile(test.body, "test_seed_oss.py", "exec"), scope)
    with pytest.raises((AnequantError, RuntimeError, AssertionError)):
        scope["test_seed_oss_stays_exact"](make_model, tmp_path)
