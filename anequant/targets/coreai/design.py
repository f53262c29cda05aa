"""What an asset of Core AI is made of, told without a weight: sizes, constants and Apple's contract.

An asset holds functions of fixed shapes over one copy of every constant (H hidden size, V vocabulary, q
positions at once, C a context, L layers, K width of keys in all heads):

    load_embeddings                                              embedding_table [V, 1, H]
    gather_embeddings_q   in_new_token_ids int32 [1, q],         gathered_embeddings [1, q, 1, H]
                          embedding_table [V, 1, H]
    extend_C_q            transformer_input [1, q, 1, H],        out_logits [1, 1, q, V]
                          position_ids uint16 [1, q],
                          in_step int32 [1],
                          causal_mask [1, C, 1, q],
                          embedding_table
    prompt_opt_C_q        the same                               out_logits, of one number

with the states key_cache and value_cache [L, 1, K, 1, C]. The host rounds a prompt up to windows of q that
begin at multiples of q, and takes `prompt_opt`, whose one purpose is to fill the caches, as long as more
tokens remain than the largest q. The table is there for heads that are tied to it; Apple's exporter makes it
an input of the others too. That is the contract of apple/coreai-models at 86b363d
(python/src/coreai_models/models/base.py, export/ios.py; CoreAIStaticShapeEngine.swift).

Without states (`kv` functional), which is how Apple's rules for the engine describe a cache
(skills/model-authoring/references/neural_engine_rules.md, "readonly pattern"), the caches are inputs that
nothing is written to, a mask [1, C + q, 1, q] covers them and then the new positions, and the functions end
in new_k and new_v [L, 1, K, 1, q], which the host puts into its caches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from anequant.architectures.spec import HEAD

FUNCTIONAL = "functional"
LOAD, GATHER, EXTEND, PREFILL = "load_embeddings", "gather_embeddings", "extend", "prompt_opt"
TABLE, TOKENS, GATHERED = "embedding_table", "in_new_token_ids", "gathered_embeddings"
HIDDEN, POSITIONS, STEP, MASK = "transformer_input", "position_ids", "in_step", "causal_mask"
CACHES, NEW = ("key_cache", "value_cache"), ("new_k", "new_v")
LOGITS = "out_logits"
COS, SIN = "rope.cos", "rope.sin"
"""Constants: the rotary tables [context, head_dim]."""

SMALLEST_CONTEXT = 256
"""The first of the contexts that functions are made for; each further one is twice as long
(IOS_STATIC_MIN_CACHE_LEN)."""

MASKED = -40000.0
"""What a mask adds to a score that does not count: the engine's softmax takes no infinity."""

WIDTHS = {bits: f"uint{bits}" for bits in (1, 2, 3, 4, 6, 8)}
"""The types of codes."""

CODES, CODEBOOK, PLAIN = ".codes", ".codebook", ".weight"
INPUT_SCALE, OUTPUT_SCALE, BIAS = ".input_scale", ".output_scale", ".bias"
"""What the names of constants end in, after that of a linear or table; PLAIN for one without codes."""


@dataclass(frozen=True)
class Constant:
    """A constant's type, float16, float32 or a type of WIDTHS, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        return int(re.sub(r"\D", "", self.dtype))

    @property
    def nbytes(self) -> int:
        return -(-math.prod(self.shape) * self.bits // 8)


@dataclass(frozen=True)
class TensorPort:
    """A tensor that a function takes, gives or keeps."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FunctionPorts:
    """What a function takes, keeps and gives: one of a `kind`, for a context and so many positions at once, 0
    where it does not matter."""

    kind: str
    context: int
    length: int
    inputs: tuple[TensorPort, ...]
    states: tuple[TensorPort, ...]
    outputs: tuple[TensorPort, ...]

    @property
    def name(self) -> str:
        return "_".join([self.kind, *(str(size) for size in (self.context, self.length) if size)])


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model; `dtype` is what is computed in, float16 or float32."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    dtype: str = "float16"

    @property
    def keys(self) -> int:
        return self.key_value_heads * self.head_dim


@dataclass(frozen=True)
class Design:
    """All that decides an asset's functions.

    context, ladder  the most positions, and how many are taken at once, ascending
    kv               state or functional
    constants        by name; what is not there is not computed: no scale of ones, no gain of ones
    steps            by a linear's full name, the scale to which its input is rounded to 8-bit integers
    eps              of norms over the residual stream, and over heads
    """

    sizes: Sizes
    context: int
    ladder: tuple[int, ...]
    kv: str
    constants: Mapping[str, Constant]
    steps: Mapping[str, float]
    eps: tuple[float, float]

    @property
    def contexts(self) -> tuple[int, ...]:
        return list_contexts(self.context)


def name_head_part(number: int) -> str:
    """Return the name of one of the head's convolutions, counted from 1."""
    return f"{HEAD}.{number}"


def list_contexts(most: int) -> tuple[int, ...]:
    """The contexts that functions are made for: SMALLEST_CONTEXT, and doubled up to `most`."""
    doublings = range((most // SMALLEST_CONTEXT).bit_length())
    return tuple(SMALLEST_CONTEXT << doubling for doubling in doublings)


def list_functions(design: Design) -> Iterator[FunctionPorts]:
    """Every function of an asset, in their order."""
    sizes, real = design.sizes, design.sizes.dtype
    table = describe_table(design)
    yield FunctionPorts(LOAD, 0, 0, (), (), (table,))
    for length in design.ladder:
        tokens = TensorPort(TOKENS, "int32", (1, length))
        gathered = TensorPort(GATHERED, real, (1, length, 1, sizes.hidden))
        yield FunctionPorts(GATHER, 0, length, (tokens, table), (), (gathered,))
    for kind in (EXTEND, PREFILL):
        for context in design.contexts:
            for length in design.ladder:
                yield describe_transformer(design, kind, context, length)


def describe_table(design: Design) -> TensorPort:
    """The embedding, as functions take and give it."""
    sizes = design.sizes
    return TensorPort(TABLE, sizes.dtype, (sizes.vocabulary, 1, sizes.hidden))


def describe_transformer(design: Design, kind: str, context: int, length: int) -> FunctionPorts:
    """The function of a `kind` for a context that takes so many positions at once."""
    sizes, real = design.sizes, design.sizes.dtype
    functional = design.kv == FUNCTIONAL
    masked = context + length if functional else context
    inputs = (
        TensorPort(HIDDEN, real, (1, length, 1, sizes.hidden)),
        TensorPort(POSITIONS, "uint16", (1, length)),
        *(() if functional else (TensorPort(STEP, "int32", (1,)),)),
        TensorPort(MASK, real, (1, masked, 1, length)),
        *(() if functional else (describe_table(design),)),
    )
    caches = tuple(TensorPort(name, real, (sizes.layers, 1, sizes.keys, 1, context)) for name in CACHES)
    new = tuple(TensorPort(name, real, (sizes.layers, 1, sizes.keys, 1, length)) for name in NEW)
    logits = TensorPort(LOGITS, real, (1, 1, length, sizes.vocabulary) if kind == EXTEND else ())
    if functional:
        given = (*new, *((logits,) if kind == EXTEND else ()))
        return FunctionPorts(kind, context, length, (*inputs, *caches), (), given)
    return FunctionPorts(kind, context, length, inputs, caches, (logits,))
