"""coreai-opt's k-means as a peer: its own module's weights, its own count of bits, and what it needs."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quality_peers import PEERS as TEXT_PEERS
from safetensors.torch import load_file
from torch import Tensor, nn

from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import BUNDLED_MODEL
from anequant.comparison import coreai_kmeans, peers
from anequant.comparison.coreai_kmeans import find_problem, palettize_with_coreai
from anequant.comparison.peers import PEERS, TABLE_ROWS, Peer, projection_bits
from anequant.errors import UnsupportedError

NAMES = {
    "coreai-opt k-means": None,
    **{f"coreai-opt k-means, a table every {size} rows": size for size in TABLE_ROWS},
}
"""Every peer's name, and how many rows share a table."""

SENSITIVE = "coreai-opt sensitive k-means"
EACH = pytest.mark.parametrize(("name", "size"), NAMES.items(), ids=lambda value: str(value))


def find(name: str) -> Peer:
    (peer,) = (peer for peer in PEERS if peer.name == name)
    return peer


def load_weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def load_model(dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=dtype)


def list_projections(model: Any) -> dict[str, nn.Linear]:
    """By the names of their weights."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


@pytest.fixture(scope="module")
def package() -> None:
    """Skips the test where the package is not installed or cannot run."""
    problem = find("coreai-opt k-means").missing
    if problem is not None:
        pytest.skip(problem)


@pytest.fixture(scope="module")
def written(package: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a peer makes of the bundled model, each once."""

    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp("written") / "out"
        find(name).run(BUNDLED_MODEL, folder)
        return folder

    return write


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(3, 512, (3, 24), generator=torch.Generator().manual_seed(1))


@functools.cache
def prepare(size: int | None) -> Any:
    """The bundled model in float16, which is what Apple's exporter for iOS palettizes, as the package has it
    before it is finalized; asked for by the package's classes instead of a dict."""
    from coreai_opt.palettization import (
        KMeansPalettizer,
        KMeansPalettizerConfig,
        ModuleKMeansPalettizerConfig,
        PalettizationSpec,
    )
    from coreai_opt.palettization.spec import PerGroupedChannelGranularity, PerTensorGranularity

    tables = PerTensorGranularity() if size is None else PerGroupedChannelGranularity(axis=0, group_size=size)
    each = ModuleKMeansPalettizerConfig(
        op_state_spec={"weight": PalettizationSpec(n_bits=4, granularity=tables)}
    )
    config = KMeansPalettizerConfig(global_config=each, module_name_configs={"lm_head": None})
    return KMeansPalettizer(load_model(torch.float16), config).prepare((torch.arange(5)[None],))


# What needs no package


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for: list[str] = []
    monkeypatch.setattr(coreai_kmeans, "OLDEST_PYTHON", (3, 0))
    monkeypatch.setattr(shutil, "which", str)
    monkeypatch.setattr(peers, "find_spec", looked_for.append)
    for name in NAMES:
        assert find(name).missing == "not installed: pip install coreai-opt"
    assert set(looked_for) == {"coreai_opt"}


def test_a_python_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreai_kmeans, "OLDEST_PYTHON", (3, 99))
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.4")
    for name in NAMES:
        assert find(name).missing == "coreai-opt needs Python 3.99 or newer, this is 3.10.4"


@pytest.mark.parametrize(("variable", "compiler"), [(None, "c++"), ("no-such-clang++", "no-such-clang++")])
def test_a_compiler_that_is_missing_is_named(
    variable: str | None, compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(coreai_kmeans, "OLDEST_PYTHON", (3, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if variable is not None:
        monkeypatch.setenv("CXX", variable)
    assert (
        find_problem()
        == f"coreai-opt compiles its k-means, and there is no '{compiler}': install a C++ compiler"
    )


@EACH
@pytest.mark.parametrize("shape", [(64, 192), (100, 5), (1, 1)])
def test_bits_of_tables_are_counted_table_by_table(
    name: str, size: int | None, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    counted = sum(16 for _ in range(0, rows, size or rows) for _ in range(16))
    assert find(name).extra(rows, columns) == counted


def test_weighted_tables_take_as_many_bits() -> None:
    spec = open_checkpoint(BUNDLED_MODEL).spec
    assert TEXT_PEERS[SENSITIVE].count_bits(spec) == projection_bits(find("coreai-opt k-means"), spec)


# What needs it


@EACH
def test_weights_are_those_of_the_packages_own_module(
    name: str, size: int | None, written: Callable[[str], Path]
) -> None:
    before, after = load_weights(BUNDLED_MODEL), load_weights(written(name))
    assert before.keys() == after.keys() and (written(name) / "tokenizer.json").is_file()
    theirs = list_projections(prepare(size))
    assert theirs.keys() == {weight for weight in after if "_proj.weight" in weight}
    for weight, values in after.items():
        if weight not in theirs:
            assert torch.equal(values, before[weight]), weight
            continue
        assert torch.equal(values, theirs[weight].weight.float()), weight
        off = float((values - before[weight]).norm() / before[weight].norm())
        assert 0.01 < off < 0.25, (weight, off)


@EACH
def test_a_table_has_sixteen_entries_and_its_rows_alone(
    name: str, size: int | None, written: Callable[[str], Path]
) -> None:
    for weight, values in load_weights(written(name)).items():
        if "_proj.weight" in weight:
            tables = [set(part.unique().tolist()) for part in values.split(size or len(values))]
            assert all(8 < len(table) <= 16 for table in tables), weight
            assert all(one != other for one, other in itertools.pairwise(tables)), weight


@EACH
@pytest.mark.usefixtures("package")
def test_bits_are_those_that_the_package_counts(name: str, size: int | None) -> None:
    from coreai_opt.inspection import bits_per_weight

    model = prepare(size)
    told = bits_per_weight(model).per_module_map
    counted, biases = 0.0, 0
    for weight, linear in list_projections(model).items():
        bias = 0 if linear.bias is None else len(linear.bias)
        counted += told[weight.removesuffix(".weight")] * (linear.weight.numel() + bias)
        biases += bias
    spec = open_checkpoint(BUNDLED_MODEL).spec
    assert projection_bits(find(name), spec) == pytest.approx(counted - 16 * biases, abs=0.5)


@pytest.mark.parametrize("weighted", [False, True])
def test_entries_are_means_weighted_by_squared_gradients(
    weighted: bool, windows: Tensor, written: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of the weights as the package sees them, which rounds to four decimals of a float16."""
    if weighted:
        TEXT_PEERS[SENSITIVE].run(BUNDLED_MODEL, tmp_path / "out", windows)
    model = load_model(torch.float32)
    after = load_weights(tmp_path / "out" if weighted else written("coreai-opt k-means"))
    linears = list_projections(model)
    fisher = {name: torch.zeros_like(linear.weight) for name, linear in linears.items()}
    for window in windows[:, None]:
        model.zero_grad()
        model(input_ids=window, labels=window).loss.backward()
        for name, linear in linears.items():
            assert linear.weight.grad is not None
            fisher[name] += linear.weight.grad.square()
    off: dict[bool, list[float]] = {True: [], False: []}
    for name, linear in linears.items():
        seen, share = (linear.weight.detach().half().double() * 1e4).round() / 1e4, fisher[name].double()
        for entry in after[name].unique():
            mine = after[name] == entry
            for by_gradient, weights in ((True, share[mine]), (False, torch.ones_like(share[mine]))):
                mean = float((seen[mine] * weights).sum() / weights.sum())
                off[by_gradient].append(abs(mean / float(entry) - 1))
    near, far = (torch.tensor(off[key]) for key in (weighted, not weighted))
    assert near.max() < 2e-3 < far.median()


@pytest.mark.usefixtures("package")
def test_a_weight_that_is_left_as_it_was_is_refused() -> None:
    wanted = r"coreai-opt does not palettize 'model\.layers\.0\..*_proj', \d+ rows, with a table every 7 rows"
    with pytest.raises(UnsupportedError, match=wanted):
        palettize_with_coreai(load_model(torch.float32), rows=7)


@pytest.mark.usefixtures("package")
def test_what_compiles_is_found_without_an_activated_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import ninja

    monkeypatch.setenv("PATH", "/nowhere")
    with coreai_kmeans._scripts_on_path():
        assert shutil.which("ninja") == os.path.join(ninja.BIN_DIR, "ninja")
    assert os.environ["PATH"] == "/nowhere"
