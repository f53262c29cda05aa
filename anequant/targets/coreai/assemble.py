"""The asset of a quantized checkpoint: constants are written, functions authored, and both joined."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from anequant.architectures.spec import ModelSpec
from anequant.checkpoints.layers import open_quantized
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import UnsupportedError
from anequant.jobs.control import Progress, silent
from anequant.jobs.typed import to_plain
from anequant.lower_options import AssetOptions
from anequant.targets.coreai.bytecode import Content, fill_blobs, read_bytecode
from anequant.targets.coreai.constant_file import ConstantFile, list_constants
from anequant.targets.coreai.design import Constant, Design, Sizes, list_functions
from anequant.targets.coreai.installed import VERSION, require_installed
from anequant.targets.coreai.worker import AUTHOR
from anequant.targets.coreai.worker_process import run_job
from anequant.targets.shared.geometry import SMALLEST_FLOAT16
from anequant.targets.shared.headroom import Headroom

PROGRAM, HASH, METADATA = "main.mlirb", "main.hash", "metadata.json"
"""The files of an asset."""

LONGEST = 3600.0
"""Seconds after which authoring counts as hanging: 24 layers take ten."""


@dataclass(frozen=True)
class AssetSize:
    """An asset on disk: its constants, one copy of each, and all the rest."""

    name: str
    constant_bytes: int
    graph_bytes: int
    functions: int


def build_asset(
    folder: Path,
    asset: Path,
    options: AssetOptions,
    headroom: Headroom,
    *,
    dtype: str = "float16",
    progress: Progress = silent,
) -> tuple[Design, AssetSize]:
    """Write the asset of a checkpoint folder to the new folder `asset`; its bytes depend on these alone.

    Constants lie beside it in a file while it is written. Raises as `list_constants` and `author_asset`.
    """
    checkpoint = open_quantized(folder)
    constants = asset.with_name(f"{asset.name}.constants")
    constants.unlink(missing_ok=True)
    file = ConstantFile(constants)
    reading = progress.part("constants", 0.0, 0.7)
    try:
        for filled in list_constants(checkpoint, headroom, options.context, dtype, reading):
            file.add(filled)
        design = make_design(checkpoint, options, headroom, dtype, file.constants)
        progress("functions", 0.7)
        author_asset(design, asset, file.read)
    finally:
        constants.unlink(missing_ok=True)
    size = sum(constant.nbytes for constant in design.constants.values())
    written = sum(path.stat().st_size for path in asset.iterdir())
    return design, AssetSize(asset.name, size, written - size, len(list(list_functions(design))))


def make_design(
    checkpoint: Checkpoint,
    options: AssetOptions,
    headroom: Headroom,
    dtype: str,
    constants: Mapping[str, Constant],
) -> Design:
    """The design of a checkpoint's asset, which has these constants."""
    spec, sizes = checkpoint.spec, read_sizes(checkpoint.spec, dtype)
    residual = max(spec.rms_norm_eps * headroom.residual_scale**2, SMALLEST_FLOAT16)
    steps = {
        name: form.scale for name, form in checkpoint.online.activations.items() if form.scale is not None
    }
    eps = (residual, spec.rms_norm_eps)
    return Design(sizes, options.context, options.ladder, options.kv, dict(constants), steps, eps)


def read_sizes(spec: ModelSpec, dtype: str = "float16") -> Sizes:
    """The numbers of a model, to be computed in a dtype."""
    return Sizes(
        spec.num_layers,
        spec.hidden_size,
        spec.intermediate_size,
        spec.num_heads,
        spec.num_key_value_heads,
        spec.head_dim,
        spec.vocab_size,
        dtype,
    )


def author_asset(design: Design, asset: Path, content: Content) -> None:
    """Write an asset with the functions of a design and the constants that `content` gives.

    Apple's package works in a process of its own, on placeholders. Raises UnsupportedError where it is not
    installed, or ends without having written the functions.
    """
    require_installed()
    asset.mkdir()
    with tempfile.TemporaryDirectory(dir=asset.parent) as scratch:
        described, template = Path(scratch) / "design.json", Path(scratch) / "template.aimodel"
        described.write_text(json.dumps(to_plain(design)), encoding="utf-8")
        where = "while it wrote the functions"
        failure = run_job(AUTHOR, (described, template), where, LONGEST)
        if failure is None and not (template / PROGRAM).is_file():
            failure = "ended without having written the functions"
        if failure is not None:
            raise UnsupportedError(
                f"coreai-core {VERSION} {failure}",
                remedy="run it again; if it stays so, lower with --target coreml",
            )
        _require_kept(design, template / PROGRAM)
        sizes = {name: constant.nbytes for name, constant in design.constants.items()}
        digest = fill_blobs(template / PROGRAM, asset / PROGRAM, sizes, content)
        metadata = json.loads((template / METADATA).read_text(encoding="utf-8"))
    (asset / HASH).write_bytes(bytes.fromhex(digest))
    write_asset_metadata(asset, metadata)


def _require_kept(design: Design, template: Path) -> None:
    """Check that Apple's package has folded no constant: it did not have its bytes.

    Raises UnsupportedError naming the first that is gone or new.
    """
    changed = design.constants.keys() ^ {blob.name for blob in read_bytecode(template).blobs}
    if changed:
        raise UnsupportedError(
            f"coreai-core {VERSION} has folded the constant '{min(changed)}'",
            remedy="lower with --target coreml, and report the recipe",
        )


def write_asset_metadata(asset: Path, found: Mapping[str, str]) -> None:
    """Write metadata.json as Apple's package does, in one order and without the time."""
    kept = {key: found[key] for key in sorted(found) if key != "creationDate"}
    (asset / METADATA).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def cut_design(design: Design, layers: int) -> Design:
    """The design of a model's first layers, which end in its norm and head."""
    if layers == design.sizes.layers:
        return design
    gone = tuple(f"model.layers.{layer}." for layer in range(layers, design.sizes.layers))
    constants = {name: value for name, value in design.constants.items() if not name.startswith(gone)}
    steps = {name: value for name, value in design.steps.items() if not name.startswith(gone)}
    return replace(design, sizes=replace(design.sizes, layers=layers), constants=constants, steps=steps)
