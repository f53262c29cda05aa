"""meta.yaml and the file names that ANEMLL's runtimes derive from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.errors import InputError, quote
from anequant.strict import parse_yaml, read_plain

META = "meta.yaml"
INFER, PREFILL = "infer", "prefill"
"""The functions of a decoder's chunk."""

LARGEST_META = 100_000
LARGEST_NUMBER, MOST_PACKAGES, LARGEST_WIDTH = 10**7, 1000, 16
FORMAT_VERSION = "0.3.4"
"""The ANEMLL release whose meta.yaml this is (its `version` key)."""


@dataclass(frozen=True)
class PackageSet:
    """What meta.yaml says: sizes and widths, from which every file name follows.

    A lut width of None means float16 weights; with `argmax` the head ends in the best token of each part,
    and `part_sizes` are their rows where meta.yaml lists them.
    """

    model: str
    architecture: str
    prefix: str
    context: int
    batch: int
    chunks: int
    head_parts: int
    lut_embeddings: int | None
    lut_ffn: int | None
    lut_head: int | None
    vocab_size: int | None = None
    argmax: bool = False
    part_sizes: tuple[int, ...] | None = None

    @property
    def embeddings(self) -> str:
        return f"{self.prefix}_embeddings{_suffix(self.lut_embeddings)}"

    @property
    def head(self) -> str:
        return f"{self.prefix}_lm_head{_suffix(self.lut_head)}"

    @property
    def ffn(self) -> str:
        return f"{self.prefix}_FFN_PF{_suffix(self.lut_ffn)}"

    @property
    def head_sizes(self) -> list[int]:
        """Rows of the vocabulary in each part of the head; empty when meta.yaml does not say."""
        if self.part_sizes is not None:
            return list(self.part_sizes)
        return [self.vocab_size // self.head_parts] * self.head_parts if self.vocab_size else []

    @property
    def chunk_names(self) -> list[str]:
        return [f"{self.ffn}_chunk_{i + 1:02d}of{self.chunks:02d}" for i in range(self.chunks)]

    @property
    def package_names(self) -> list[str]:
        """All packages in running order, without the .mlpackage ending."""
        return [self.embeddings, *self.chunk_names, self.head]

    def keys_of(self, name: str) -> str:
        """The keys of meta.yaml that the file name of package `name` follows from, in words."""
        of_part = {self.embeddings: "lut_embeddings", self.head: "lut_lmhead"}
        return (
            f"model_prefix and {of_part[name]}" if name in of_part else "model_prefix, lut_ffn and num_chunks"
        )


def write_meta(folder: Path, packages: PackageSet) -> None:
    """Write meta.yaml with ANEMLL's keys and indentation (scripts there read it by column), and the model's
    name without what means something in YAML."""
    name = re.sub(r"[^\w.+-]+", "-", packages.model)
    text = f"""model_info:
  name: anemll-{name}-ctx{packages.context}
  version: {FORMAT_VERSION}
  description: |
    {name} for the Apple Neural Engine
    Context length: {packages.context}
    Batch size: {packages.batch}
    Chunks: {packages.chunks}
  license: MIT
  author: anequant
  framework: Core ML
  language: Python
  architecture: {packages.architecture}
  parameters:
    context_length: {packages.context}
    batch_size: {packages.batch}
    lut_embeddings: {_word(packages.lut_embeddings)}
    lut_ffn: {_word(packages.lut_ffn)}
    lut_lmhead: {_word(packages.lut_head)}
    num_chunks: {packages.chunks}
    model_prefix: {packages.prefix}
    embeddings: {packages.embeddings}.mlmodelc
    lm_head: {packages.head}.mlmodelc
    ffn: {packages.ffn}.mlmodelc
    split_lm_head: {packages.head_parts}
    prefill_dynamic_slice: true
"""
    if packages.argmax:
        text += f"    argmax_in_model: true\n    vocab_size: {packages.vocab_size}\n"
        text += f"    lm_head_chunk_sizes: {packages.head_sizes}\n"
    (folder / META).write_text(text, encoding="utf-8")


def read_meta(folder: Path) -> PackageSet:
    """The package set that a folder's meta.yaml describes. Raises InputError naming a missing key."""
    try:
        content = parse_yaml(read_plain(folder / META, LARGEST_META))
    except (OSError, ValueError) as error:
        raise InputError(f"'{META}' cannot be read: {error}", where=str(folder)) from error
    try:
        info = content["model_info"]
        values = info["parameters"]
        prefix = str(values["model_prefix"])
        if not re.fullmatch(r"\w[\w.-]*", prefix, re.ASCII):
            raise ValueError(f"model_prefix, it is {quote(prefix)}")
        return PackageSet(
            model=str(info["name"]).removeprefix("anemll-").rsplit("-ctx", 1)[0],
            architecture=str(info["architecture"]),
            prefix=prefix,
            context=_number(values, "context_length"),
            batch=_number(values, "batch_size"),
            chunks=_number(values, "num_chunks", MOST_PACKAGES),
            head_parts=_number(values, "split_lm_head", MOST_PACKAGES),
            lut_embeddings=_width(values, "lut_embeddings"),
            lut_ffn=_width(values, "lut_ffn"),
            lut_head=_width(values, "lut_lmhead"),
            vocab_size=_number(values, "vocab_size") if "vocab_size" in values else None,
            argmax=_flag(values, "argmax_in_model"),
            part_sizes=_sizes(values, "lm_head_chunk_sizes"),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"'{META}' lacks or misstates {error}", where=str(folder)) from error


def _number(values: Mapping[str, Any], key: str, most: int = LARGEST_NUMBER) -> int:
    number = values[key]
    if type(number) is not int or not 1 <= number <= most:
        raise ValueError(f"{key}, it is {quote(number)}")
    return number


def _width(values: Mapping[str, Any], key: str) -> int | None:
    return None if values[key] == "none" else _number(values, key, LARGEST_WIDTH)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    flag = values.get(key, False)
    if not isinstance(flag, bool):
        raise ValueError(f"{key}, it is {quote(flag)}")
    return flag


def _sizes(values: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    sizes = values.get(key)
    if sizes is None:
        return None
    if not isinstance(sizes, list) or not all(
        type(size) is int and 0 < size <= LARGEST_NUMBER for size in sizes
    ):
        raise ValueError(f"{key}, it is {quote(sizes)}")
    return tuple(sizes)


def _suffix(bits: int | None) -> str:
    return "" if bits is None else f"_lut{bits}"


def _word(bits: int | None) -> str:
    return "none" if bits is None else str(bits)
