"""What reads files that others wrote, as functions of bytes: for the property tests and for `make fuzz`.

Each target is a file in a folder that is otherwise sound, and what reads it. Whatever the bytes, reading ends
well or in an AnequantError.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from anequant.architectures import read_spec
from anequant.architectures.spec import layer_prefix
from anequant.calibration.tokens import calibrate_on_whole_file, read_calibration_tokens
from anequant.checkpoints.contract import check_contract
from anequant.checkpoints.header import read_header
from anequant.checkpoints.layers import load_layer, load_table, open_quantized
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.rotation_files import read_rotations
from anequant.cli import main
from anequant.errors import AnequantError
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe
from anequant.reference.empty_model import build_empty_model
from anequant.targets.coreml.graph import read_graphs
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.lint.lint import lint_package
from anequant.targets.coreml.meta import read_meta
from anequant.targets.coreml.program.package import MODEL_FILE, WEIGHT_FILE
from anequant.verification.packages import verify_items, verify_package_files
from anequant.verification.verify import verify_checkpoint

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 64,
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
RECIPES = {
    "toml": 'codebook = "uniform"\nbits = 4\ncorrection = 0.5\nfold_input_scales = false\n',
    "json": '{"r1": "none", "bits": 8, "mixed_bits": "4,8", "target_bits": 5.5}',
    "yaml": "r1: hadamard\nbits: 4\nactivation_overrides: down_proj=16\ntune: 0\n",
}


@dataclass(frozen=True)
class Target:
    """`file` holds a sound example at first; `read` reads it."""

    file: Path
    read: Callable[[], object]

    def __call__(self, content: bytes) -> None:
        """Raises what `read` raises, unless that is an AnequantError."""
        self.file.write_bytes(content)
        try:
            self.read()
        except AnequantError as error:
            assert str(error).strip()


def write_model(folder: Path) -> None:
    """A random model of a few kilobytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    spec = read_spec(CONFIG, "")
    shapes = {layer_prefix(0) + name: shape for name, shape in spec.layer_tensors().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.rand(shape, generator=generator).sub_(0.3)
        for name, shape in {**shapes, **spec.outer_tensors()}.items()
    }
    save_file(tensors, folder / WEIGHTS)


def build_targets(place: Path) -> dict[str, Target]:
    """Every target by name, with the files it needs in the new folder `place`."""
    model = place / "model"
    write_model(model)
    _run("quantize", model, "-o", place / "checkpoint", "--recipe", "w4-nearest", "--r1-block", "16")
    _run("lower", place / "checkpoint", "-o", place / "packages", "--context", "16", "--batch", "8")
    targets = _model_targets(model) | _recipe_targets(place) | _output_targets(place)
    return dict(sorted(targets.items()))


def _run(*arguments: object) -> None:
    result = CliRunner().invoke(main, [*map(str, arguments), "--quiet"])
    assert result.exit_code == 0, result.output


def _copy(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.parent / f"{folder.name}-{name}"))


def _model_targets(model: Path) -> dict[str, Target]:
    header, config, sharded, calibrated = (
        _copy(model, name) for name in ("header", "config", "index", "ids")
    )
    content = (model / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    body = header / "header.json"
    body.write_bytes(content[8:end])
    entries = json.loads(content[8:end])
    (sharded / WEIGHTS).rename(sharded / SHARDS[0])
    save_file({"other": torch.zeros(1)}, sharded / SHARDS[1])
    weight_map = {**dict.fromkeys(sorted(set(entries) - {"__metadata__"}), SHARDS[0]), "other": SHARDS[1]}
    (sharded / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    ids = calibrated / "ids.json"
    ids.write_text(json.dumps([{"input_ids": [1, 2, 3, 4]}, [5, 6, 7, 8]]))
    single = Path(shutil.copyfile(model / WEIGHTS, model.parent / "file.safetensors"))
    rotations = model.parent / "rotations.safetensors"
    save_file({"r1": torch.eye(4, dtype=torch.float64), "r2.0": torch.eye(2)}, rotations)

    def read_body() -> None:
        text = body.read_bytes()
        (header / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
        _read_everything(header)

    def read_ids() -> None:
        checkpoint = open_checkpoint(calibrated)
        read_calibration_tokens(Calibration((str(ids),), samples=2, length=4), checkpoint)
        calibrate_on_whole_file(str(ids))

    return {
        "header": Target(body, read_body),
        "safetensors": Target(single, lambda: read_header(single)),
        "config": Target(config / "config.json", lambda: build_empty_model(open_checkpoint(config).spec)),
        "index": Target(sharded / INDEX, lambda: open_checkpoint(sharded)),
        "calibration": Target(ids, read_ids),
        "rotations": Target(rotations, lambda: read_rotations(rotations, {"r1": 4, "r2.0": 2})),
    }


def _read_everything(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors:
        checkpoint.read(name)


def _recipe_targets(place: Path) -> dict[str, Target]:
    targets = {}
    for suffix, text in RECIPES.items():
        file = place / f"recipe.{suffix}"
        file.write_text(text)
        targets[suffix] = Target(file, lambda file=file: load_recipe(str(file)))  # type: ignore[misc]
    return targets


def _output_targets(place: Path) -> dict[str, Target]:
    checkpoint, written = (_copy(place / "checkpoint", name) for name in ("tensors", "manifest"))
    packages = {
        name: _copy(place / "packages", name) for name in ("meta", "files", "model", "decoder", "blobs")
    }
    found = read_meta(place / "packages")
    head = {name: packages[name] / f"{found.head}.mlpackage" for name in ("files", "model", "blobs")}
    decoder = packages["decoder"] / f"{found.chunk_names[0]}.mlpackage"

    def read_tensors() -> None:
        opened = open_quantized(checkpoint)
        load_layer(opened, 0)
        for name in ("model.embed_tokens", "lm_head"):
            load_table(opened, name)
        check_contract(checkpoint)

    def read_package(package: Path) -> None:
        list(Package.open(package).read_compressed_weights())
        for graph in read_graphs(package):
            list(graph.computing())
        lint_package(package)

    def read_files() -> None:
        verify_items(head["files"])
        read_package(head["files"])

    def read_blobs() -> None:
        read_package(head["blobs"])
        verify_package_files(packages["blobs"])

    def read_manifest() -> None:
        verify_checkpoint(written)

    return {
        "tensors": Target(checkpoint / WEIGHTS, read_tensors),
        "anequant": Target(written / "anequant.json", read_manifest),
        "meta": Target(packages["meta"] / "meta.yaml", lambda: verify_package_files(packages["meta"])),
        "manifest": Target(head["files"] / "Manifest.json", read_files),
        "model": Target(head["model"] / MODEL_FILE, lambda: read_package(head["model"])),
        "decoder": Target(decoder / MODEL_FILE, lambda: read_package(decoder)),
        "weights": Target(head["blobs"] / WEIGHT_FILE, read_blobs),
    }
