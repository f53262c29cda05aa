"""Rules about the files of an asset and of the bundle around it, and about constants among its blobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anequant.errors import VerificationError
from anequant.targets.coreai.assemble import HASH, PROGRAM
from anequant.targets.coreai.bundle import METADATA, TOKENIZER, VERSION
from anequant.targets.coreai.lint.linted import Linted
from anequant.targets.coreai.listed_weights import list_forms
from anequant.targets.coreai.stored import StoredAsset, verify_hash
from anequant.targets.shared.finding import ERROR, WARNING, Hit, rule

KINDS = ("llm", "vlm", "diffusion", "segmenter", "speech_recognizer")
"""Of bundles, as in BundleKind.swift."""

LANGUAGE: dict[str, type] = {"tokenizer": str, "vocab_size": int, "max_context_length": int}
"""What LanguageConfig.swift does not do without."""

DAMAGE = "CF1"


@rule(DAMAGE, ERROR, "main.hash is the sha256 of main.mlirb (coreai-core 1.0.0b3)", "write the asset again")
def _hash(linted: Linted) -> Iterator[Hit]:
    if not (linted.asset / HASH).is_file():
        yield Hit(HASH, "the file is missing", WARNING)
        return
    try:
        verify_hash(linted.asset)
    except VerificationError as error:
        yield Hit(HASH, f"{error.what}; the functions are not looked at")


@rule(
    "CF2",
    ERROR,
    "a bundle's metadata is of version 0.2 and a known kind (apple/coreai-models, ModelBundle.swift)",
    "write metadata.json as the runner reads it",
)
def _metadata(linted: Linted) -> Iterator[Hit]:
    if linted.bundle is None:
        return
    found = linted.metadata
    if found.get("metadata_version") != VERSION:
        yield Hit(METADATA, f"metadata_version is {found.get('metadata_version')!r}, not {VERSION!r}")
    if found.get("kind") not in KINDS:
        yield Hit(METADATA, f"kind is {found.get('kind')!r}, not one of {', '.join(KINDS)}")
    if not isinstance(found.get("name"), str):
        yield Hit(METADATA, "there is no name")
    assets = found.get("assets")
    for role, name in sorted(assets.items()) if isinstance(assets, dict) else ():
        if not isinstance(name, str) or not _is_there(linted.bundle, name):
            yield Hit(METADATA, f"asset '{role}', {name!r}, is not there")


@rule(
    "CF3",
    ERROR,
    "a language model names tokenizer, vocabulary and context (apple/coreai-models, LanguageConfig.swift)",
    "write the block 'language' as the runner reads it",
)
def _language(linted: Linted) -> Iterator[Hit]:
    if linted.metadata.get("kind") != "llm":
        return
    language: Any = linted.metadata.get("language")
    if not isinstance(language, dict):
        yield Hit(METADATA, "there is no block 'language'")
        return
    for key, kind in LANGUAGE.items():
        value = language.get(key)
        if type(value) is not kind or value in (0, ""):
            yield Hit(METADATA, f"language.{key} is {value!r}")
    source = linted.metadata.get("source")
    if isinstance(source, dict) and not source.get("hf_model_id"):
        yield Hit(METADATA, "source has no hf_model_id, which the runner asks for where there is a source")


@rule(
    "CF4",
    ERROR,
    "a bundle with its own tokenizer is opened without the hub (apple/coreai-models, LanguageBundle.swift)",
    "put tokenizer.json into the folder tokenizer",
)
def _tokenizer(linted: Linted) -> Iterator[Hit]:
    language: Any = linted.metadata.get("language")
    if linted.bundle is None or not isinstance(language, dict):
        return
    if language.get("embedded_tokenizer", True) is not True:
        yield Hit(METADATA, "the tokenizer is loaded from the hub", WARNING)
    elif not (linted.bundle / TOKENIZER / "tokenizer.json").is_file():
        yield Hit(TOKENIZER, "tokenizer.json is missing")


@rule(
    "CF5",
    ERROR,
    "what is no number in a weight is none in any logit; the engine's softmax takes no infinity "
    "(apple/coreai-models, neural_engine_rules.md)",
    "write the asset from a sound model",
)
def _numbers(linted: Linted) -> Iterator[Hit]:
    stored = StoredAsset(linted.asset)
    for name, form in list_forms(linted.functions).items():
        if form.dtype in ("float16", "float32") and name in stored.blobs:
            pieces = (np.frombuffer(piece, form.dtype) for piece in stored.read(name))
            if not all(bool(np.isfinite(piece).all()) for piece in pieces):
                yield Hit(name, f"{form.dtype} with infinities or what is no number")


def _is_there(bundle: Path, name: str) -> bool:
    """Whether an asset lies in the bundle, or what Apple's compiler made of it."""
    inside = Path(name).name == name
    return inside and ((bundle / name / PROGRAM).is_file() or (bundle / f"{name}c").is_dir())


FILE_RULES = (_hash, _metadata, _language, _tokenizer)
BLOB_RULES = (_numbers,)
