"""The host's part of an asset: tokens in, logits out, as Apple's engine goes about it.

Tokens are fed in windows of q positions that begin at multiples of q: the smallest q that takes all that
remain, or the largest one. Functions of the smallest context that holds the window are used
(CoreAIStaticShapeEngine.swift, `forwardGraph`). A window may begin before what is new: those positions are
computed again, with the same keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anequant.targets.coreai.design import (
    CACHES,
    EXTEND,
    FUNCTIONAL,
    GATHER,
    GATHERED,
    HIDDEN,
    LOAD,
    LOGITS,
    MASK,
    MASKED,
    NEW,
    POSITIONS,
    PREFILL,
    STEP,
    TABLE,
    TOKENS,
    Design,
    list_functions,
)
from anequant.targets.coreai.messages import Array
from anequant.targets.coreai.runner import Runner


@dataclass(frozen=True)
class Window:
    """Positions from `start` on, `count` of them tokens, in a function that takes `length` at once."""

    start: int
    count: int
    length: int
    context: int


def choose_window(design: Design, fed: int, total: int) -> Window:
    """The window that computes the positions from `fed` on, of `total` tokens."""
    remaining = total - fed
    length = next((size for size in design.ladder if size >= remaining), design.ladder[-1])
    start = fed // length * length
    stop = min(start + length, total)
    context = next(context for context in design.contexts if context > fed)
    return Window(start, stop - start, length, context)


class Host:
    """An asset with caches; `tokens` have been fed."""

    def __init__(self, runner: Runner, design: Design) -> None:
        self._runner, self._design = runner, design
        self._float = np.dtype(design.sizes.dtype)
        self._ports = {(ports.kind, ports.context, ports.length): ports for ports in list_functions(design)}
        self._runner.run(self._ports[LOAD, 0, 0], {}, keep=[TABLE])
        self._caches: dict[str, Array] = {}
        self.tokens: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.tokens = []
        self._runner.forget()
        sizes = self._design.sizes
        shape = (sizes.layers, 1, sizes.keys, 1, self._design.context)
        if self._design.kv == FUNCTIONAL:
            self._caches = {name: np.zeros(shape, self._float) for name in CACHES}

    def feed(self, tokens: Sequence[int]) -> Array:
        """Append tokens, one at least; return logits [V] for what follows the last one."""
        first = len(self.tokens)
        self.tokens += tokens
        logits = np.zeros(0)
        while first < len(self.tokens):
            remaining = len(self.tokens) - first
            kind = PREFILL if remaining > self._design.ladder[-1] else EXTEND
            window = choose_window(self._design, first, len(self.tokens))
            found = self._run(kind, window)
            if kind == EXTEND:
                logits = found[0, 0, window.count - 1]
            first = window.start + window.count
        return logits

    def score(self, tokens: Sequence[int], length: int) -> Array:
        """Logits [n, V] for what follows each of n tokens, `length` at once, from an empty cache."""
        self.reset()
        self.tokens = list(tokens)
        return np.concatenate(
            [self._run(EXTEND, window)[0, 0, : window.count] for window in self._list_windows(length)]
        )

    def fill(self, tokens: Sequence[int], length: int) -> None:
        """Take tokens, `length` at once, into an empty cache; nobody wants their logits."""
        self.reset()
        self.tokens = list(tokens)
        for window in self._list_windows(length):
            self._run(PREFILL, window)

    def _list_windows(self, length: int) -> Iterator[Window]:
        """Windows of one length over all tokens."""
        for start in range(0, len(self.tokens), length):
            context = next(context for context in self._design.contexts if context > start)
            yield Window(start, min(length, len(self.tokens) - start), length, context)

    def _run(self, kind: str, window: Window) -> Array:
        """Run a window; return the logits [1, 1, q, V], or what a function of PREFILL has instead."""
        start, length = window.start, window.length
        ids = np.zeros((1, length), np.int32)
        ids[0, : window.count] = self.tokens[start : start + window.count]
        gather, ports = self._ports[GATHER, 0, length], self._ports[kind, window.context, length]
        self._runner.run(gather, {TOKENS: ids}, kept={TABLE: TABLE}, keep=[GATHERED])
        kept = {HIDDEN: GATHERED} | {port.name: TABLE for port in ports.inputs if port.name == TABLE}
        found = self._runner.run(ports, self._fill_inputs(window), kept=kept)
        if self._design.kv == FUNCTIONAL:
            for name, new in zip(CACHES, NEW, strict=True):
                self._caches[name][..., start : start + length] = found[new]
        return found.get(LOGITS, np.zeros(0))

    def _fill_inputs(self, window: Window) -> dict[str, Array]:
        start, length, context = window.start, window.length, window.context
        positions = np.arange(start, start + length, dtype=np.uint16)[None]
        if self._design.kv != FUNCTIONAL:
            mask = make_mask(window, self._float)
            return {POSITIONS: positions, STEP: np.array([start], np.int32), MASK: mask}
        caches = {name: cache[..., :context] for name, cache in self._caches.items()}
        return {POSITIONS: positions, MASK: make_functional_mask(window, self._float), **caches}


def make_mask(window: Window, dtype: Any) -> Array:
    """The mask [1, C, 1, q]: a position sees itself and those before it, one beyond the tokens nothing."""
    keys = np.arange(window.context)[:, None]
    queries = np.arange(window.length)[None]
    seen = (keys <= window.start + queries) & (queries < window.count)
    return np.where(seen, 0, MASKED).astype(dtype)[None, :, None]


def make_functional_mask(window: Window, dtype: Any) -> Array:
    """The mask [1, C + q, 1, q]: of the cache what lies before the window, then the window itself."""
    queries = np.arange(window.length)[None]
    cached = np.broadcast_to(
        np.arange(window.context)[:, None] < window.start, (window.context, window.length)
    )
    seen = np.concatenate([cached, np.arange(window.length)[:, None] <= queries]) & (queries < window.count)
    return np.where(seen, 0, MASKED).astype(dtype)[None, :, None]
