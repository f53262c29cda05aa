"""rotations.safetensors: the round trip, what is refused, and rotating the same with it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import invoke, succeed
from safetensors.torch import load_file, save_file
from torch import Tensor

from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.rotation_files import ROTATIONS, read_rotations, write_rotations
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.errors import InputError, UsageError
from anequant.recipe import Recipe
from anequant.rotation.orthogonal import draw_random_rotation
from anequant.rotation.rotation_plan import list_matrix_sizes, plan_rotations

SIZES = {"r1": 12, "r2.0": 4, "r2.1": 4}
FEW_TOKENS = ("--calib-samples", 4, "--calib-length", 32)
SUCCESS, USAGE, INPUT = 0, 2, 3


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: draw_random_rotation(size, generator).dense() for name, size in SIZES.items()}


def test_what_was_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    write_rotations(tmp_path, matrices())
    read = read_rotations(tmp_path / ROTATIONS, SIZES)
    assert read.keys() == SIZES.keys()
    assert all(torch.equal(read[name], matrix) for name, matrix in matrices().items())
    assert read_rotations(tmp_path / ROTATIONS, {"r2.1": 4}).keys() == {"r2.1"}


def test_float32_is_made_orthogonal_to_the_last_digit(tmp_path: Path) -> None:
    path = tmp_path / ROTATIONS
    save_file({name: matrix.float() for name, matrix in matrices().items()}, path)
    for name, matrix in read_rotations(path, SIZES).items():
        assert matrix.dtype == torch.float64
        assert float((matrix.T @ matrix - torch.eye(len(matrix), dtype=torch.float64)).abs().max()) < 1e-14
        assert float((matrix - matrices()[name]).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("r2.1"), "'r2.1' is missing"),
        (lambda tensors: tensors.update(r1=torch.eye(8)), r"'r1' has shape \[8, 8\]"),
        (lambda tensors: tensors.update(r1=torch.eye(12).half()), "'r1' is F16"),
        (lambda tensors: tensors["r2.0"][0, 0].add_(1e-5), "'r2.0' is not orthogonal"),
        (lambda tensors: tensors["r2.0"][0, 0].fill_(float("nan")), "'r2.0' is not orthogonal"),
    ],
)
def test_a_matrix_that_does_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    tensors, path = matrices(), tmp_path / "mine.safetensors"
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(InputError, match=words) as caught:
        read_rotations(path, SIZES)
    assert "mine.safetensors" in caught.value.where


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_rotations(tmp_path / "absent", SIZES)
    (tmp_path / "text").write_text("no rotations", encoding="utf-8")
    with pytest.raises(InputError, match="'text'"):
        read_rotations(tmp_path / "text", SIZES)


@pytest.fixture(scope="module")
def pca(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pca") / "out"
    recipe = ("--recipe", "w4-nearest", "--r1", "pca")
    succeed("quantize", tiny_qwen2, "-o", folder, *recipe, "--calib", SAMPLE_TEXT, *FEW_TOKENS)
    return folder


def test_rotations_that_no_seed_tells_are_kept(tiny_qwen2: Path, pca: Path, tmp_path: Path) -> None:
    spec = open_checkpoint(tiny_qwen2).spec
    kept = read_rotations(pca / ROTATIONS, list_matrix_sizes(spec, Recipe(r1="pca")))
    drawn = plan_rotations(spec, Recipe(r1="pca"), basis=torch.eye(spec.hidden_size, dtype=torch.float64))
    assert torch.equal(kept["r2.1"], drawn.matrices()["r2.1"])
    written = json.loads((pca / "anequant.json").read_text(encoding="utf-8"))
    assert ROTATIONS in written["files"]
    assert written["measured"]["rotations"] == {"seed": 0, "restarts": [], "learned": None}
    succeed("quantize", tiny_qwen2, "-o", tmp_path / "seeded", "--recipe", "w4-nearest")
    assert not (tmp_path / "seeded" / ROTATIONS).exists()


def test_the_file_rotates_the_same_again(tiny_qwen2: Path, pca: Path, tmp_path: Path) -> None:
    again, half = tmp_path / "again", tmp_path / "half"
    base = ("quantize", tiny_qwen2, "--recipe", "w4-nearest", "--r1", "file", "--rotations", pca / ROTATIONS)
    succeed(*base, "-o", again, "--r2", "file")
    succeed(*base, "-o", half)
    for name in ("model.safetensors", ROTATIONS, "config.json"):
        assert (again / name).read_bytes() == (pca / name).read_bytes(), name
    ours, theirs = load_file(half / ROTATIONS), load_file(pca / ROTATIONS)
    assert torch.equal(ours["r1"], theirs["r1"]), "R1 of the file, R2 drawn"
    assert not torch.equal(load_file(half / "model.safetensors")["lm_head.weight"], torch.zeros(1))


def test_eval_reads_r1_from_the_file(tiny_qwen2: Path, pca: Path, tmp_path: Path) -> None:
    """Layer errors compare streams in the same basis; without the file nothing tells it."""
    text = ("--text", SAMPLE_TEXT, "--base", tiny_qwen2, "--windows", 2, "--length", 32)
    result = invoke("eval", pca, *text, "--json")
    assert result.exit_code == SUCCESS, result.stderr
    layers = json.loads(result.stdout)["layers"]
    assert layers and all(layer["relative_error"] < 0.5 for layer in layers), layers
    (pca / ROTATIONS).rename(tmp_path / "elsewhere")
    try:
        result = invoke("eval", pca, *text)
    finally:
        (tmp_path / "elsewhere").rename(pca / ROTATIONS)
    assert result.exit_code == INPUT
    assert ROTATIONS in result.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (("--r1", "file"), USAGE, "'r1' is 'file'"),
        (("--r2", "file"), USAGE, "'r2' is 'file'"),
        (("--rotations", "FILE"), USAGE, "--rotations names"),
        (("--r1", "file", "--rotations", "absent"), USAGE, "'absent' does not exist"),
        (("--r1", "file", "--rotations", SAMPLE_TEXT), INPUT, "sample.txt"),
        (("--r1", "file", "--r2", "file", "--rotations", "FILE"), INPUT, "'r1' has shape [12, 12]"),
        (("--r1", "none", "--r2", "none", "--restarts", 2), USAGE, "restarts"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "rotate"])
def test_what_is_refused_leaves_nothing(
    tiny_qwen2: Path, tmp_path: Path, command: str, options: tuple[object, ...], code: int, word: str
) -> None:
    (tmp_path / "files").mkdir()
    write_rotations(tmp_path / "files", matrices())
    args = [tmp_path / "files" / ROTATIONS if option == "FILE" else option for option in options]
    calibration = ("--calib", SAMPLE_TEXT, *FEW_TOKENS)
    result = invoke(
        command, tiny_qwen2, "-o", tmp_path / "out", "--recipe", "w4-nearest", *calibration, *args
    )
    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith("error: ") and word in result.stderr.splitlines()[0], result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["files"]
