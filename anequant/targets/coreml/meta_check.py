"""meta.yaml against the packages that it describes: what it says of them is what they declare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from anequant.errors import InputError
from anequant.targets.coreml.meta import INFER, META, PREFILL, PackageSet
from anequant.targets.coreml.signatures import FunctionSpec, TensorSpec
from anequant.targets.coreml.storage import damage

Functions = Mapping[str, FunctionSpec]
Claim = tuple[str, object, object]
"""A key of meta.yaml, what is said there, and what the package declares: None for any."""


def check_package(packages: PackageSet, name: str, functions: Functions, folder: Path) -> None:
    """Compare what meta.yaml says with the functions that package `name` declares.

    Raises InputError that names the first key which the package contradicts, or the function or tensor that
    it lacks.
    """
    if name == packages.embeddings:
        claims = _claim_embeddings(packages, functions)
    elif name == packages.head:
        claims = _claim_head(packages, functions)
    else:
        claims = _claim_chunk(packages, functions)
    package = f"{name}.mlpackage"
    with damage(str(folder / package)):
        for key, said, found in claims:
            if found is not None and said != found:
                raise InputError(
                    f"'{key}' of {META} is {said}, '{package}' is made for {found}",
                    where=str(folder / META),
                    remedy=f"write {found} there, or lower the checkpoint again",
                )


def _claim_embeddings(packages: PackageSet, functions: Functions) -> Iterator[Claim]:
    spec = _take_only(functions)
    lengths = [shape[-1] for shape in spec.enumerated.get("input_ids", ())]
    if lengths and packages.batch not in lengths:
        yield "batch_size", packages.batch, max(lengths)


def _claim_chunk(packages: PackageSet, functions: Functions) -> Iterator[Claim]:
    for function in (INFER, PREFILL):
        if function not in functions:
            raise LookupError(f"no function '{function}'")
        *_, rows, columns = _find_tensor(functions[function].inputs, "causal_mask").shape
        yield "context_length", packages.context, columns
        if function == PREFILL:
            yield "batch_size", packages.batch, rows


def _claim_head(packages: PackageSet, functions: Functions) -> Iterator[Claim]:
    spec = _take_only(functions)
    logits = [tensor.shape[-1] for tensor in spec.outputs if tensor.name.startswith("logits")]
    yield "argmax_in_model", packages.argmax, not logits
    parts = logits or list(spec.choices)
    sizes = [size for size in parts if size is not None]
    if not parts or len(sizes) < len(parts):
        raise LookupError("a head of unknown sizes")
    yield "split_lm_head", packages.head_parts, len(sizes)
    if packages.vocab_size is not None:
        yield "vocab_size", packages.vocab_size, sum(sizes)
    if packages.argmax or packages.part_sizes is not None:
        yield "lm_head_chunk_sizes", packages.head_sizes, sizes


def _take_only(functions: Functions) -> FunctionSpec:
    if not functions:
        raise LookupError("no function")
    return next(iter(functions.values()))


def _find_tensor(tensors: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    for tensor in tensors:
        if tensor.name == name and tensor.shape:
            return tensor
    raise LookupError(f"no tensor '{name}'")
