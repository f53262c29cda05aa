"""A bundle as Apple's runner opens it: metadata.json, the asset and the tokenizer.

    metadata.json           metadata_version 0.2, kind llm, the asset's name, and what of the model the runner
                            reads (apple/coreai-models at 86b363d: ModelBundle.swift, LanguageConfig.swift)
    NAME.aimodel/           main.mlirb, main.hash, metadata.json
    tokenizer/              the model's own files, and in config.json which tokens end a text
    design.json             anequant's own: what the functions are made of

The key `source` is left out: it is for models that came by way of torch, and Apple's reader decodes none.
"""

from __future__ import annotations

import re
from pathlib import Path

from anequant.checkpoints.reader import Checkpoint, read_object
from anequant.checkpoints.side_files import copy_tokenizer
from anequant.checkpoints.writer import write_json
from anequant.errors import InputError, quote
from anequant.jobs.typed import from_plain, to_plain
from anequant.targets.coreai.design import Design
from anequant.targets.shared.headroom import Headroom

METADATA, TOKENIZER, DESIGN = "metadata.json", "tokenizer", "design.json"
VERSION = "0.2"


def name_asset(model: str) -> str:
    """Return the name of a model's asset, a folder's name on any system."""
    return re.sub(r"^[.-]+|[^\w.+-]+", "-", model).removeprefix("-") + ".aimodel"


def write_bundle(folder: Path, asset: str, model: str, checkpoint: Checkpoint, context: int) -> None:
    """Write what lies beside the asset."""
    spec = checkpoint.spec
    content = {
        "metadata_version": VERSION,
        "kind": "llm",
        "name": asset.removesuffix(".aimodel"),
        "assets": {"main": asset},
        "language": {
            "tokenizer": TOKENIZER,
            "vocab_size": spec.vocab_size,
            "max_context_length": context,
            "embedded_tokenizer": True,
        },
    }
    write_json(folder / METADATA, content)
    (folder / TOKENIZER).mkdir(exist_ok=True)
    copy_tokenizer(checkpoint.folder, folder / TOKENIZER)
    ends = {
        key: spec.config[key] for key in ("bos_token_id", "eos_token_id") if spec.config.get(key) is not None
    }
    write_json(folder / TOKENIZER / "config.json", {"model_type": spec.architecture.model_type, **ends})


def find_asset(folder: Path) -> Path:
    """Find the asset of a bundle; raises InputError where metadata.json names none that is there."""
    content = read_object(folder / METADATA)
    assets = content.get("assets")
    name = assets.get("main") if isinstance(assets, dict) else None
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".aimodel"):
        raise InputError(f"'{METADATA}' names the asset {quote(name)}", where=str(folder))
    if not (folder / name).is_dir():
        raise InputError(f"asset {quote(name)} is missing", where=str(folder), remedy="lower it again")
    return folder / name


def write_design(folder: Path, design: Design, headroom: Headroom) -> None:
    """Write what an asset was made by, every number exactly."""
    write_json(folder / DESIGN, {"design": to_plain(design), "headroom": to_plain(headroom)})


def read_design(folder: Path) -> tuple[Design, Headroom]:
    """Read what `write_design` wrote; raises InputError where it is missing or makes no sense."""
    content = read_object(folder / DESIGN)
    try:
        design: Design = from_plain(Design, content["design"])
        return design, from_plain(Headroom, content["headroom"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"'{DESIGN}' does not describe an asset", where=str(folder)) from error
