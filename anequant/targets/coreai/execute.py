"""An asset run by Apple's runtime, in a process that does nothing else, as told by messages.

    {"run": name, "kept": {input: output}, "keep": [..], "states": {name: shape}}, inputs    -> outputs
    {"describe": name}                                                            -> its ports
    {"forget": true}                                                              -> states begin anew

`keep` names outputs that stay here, for inputs of later runs that `kept` names. A state begins as zeros;
asked for with another shape, it keeps what lies in both.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

from anequant.targets.coreai.coreai_toolkit import AIModelAsset, NDArray
from anequant.targets.coreai.messages import Array, receive, send

OUTPUT, ERRORS = 1, 2
"""File descriptors."""


def serve(path: Path) -> None:
    """Run the asset until the messages end. What the runtime prints goes to stderr."""
    answers = os.fdopen(os.dup(OUTPUT), "wb")
    os.dup2(ERRORS, OUTPUT)
    asyncio.run(_serve(path, sys.stdin.buffer, answers))


async def _serve(path: Path, orders: IO[bytes], answers: IO[bytes]) -> None:
    try:
        async with AIModelAsset.load(str(path)).executable() as model:
            send(answers, {"functions": list(model.function_names)})
            host = _Host(model)
            while True:
                try:
                    order, arrays = receive(orders)
                except EOFError:
                    return
                try:
                    answer, outputs = await host.answer(order, arrays)
                    send(answers, answer, outputs)
                except Exception as error:
                    send(answers, {"error": f"{type(error).__name__}: {error}"})
    except Exception as error:
        send(answers, {"error": f"{type(error).__name__}: {error}"})


class _Host:
    """What lives on between orders: functions, states, and outputs that were kept."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._functions: dict[str, Any] = {}
        self._states: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}

    async def answer(self, order: dict[str, Any], arrays: dict[str, Array]) -> tuple[dict[str, Any], Any]:
        if "describe" in order:
            return _describe(self._find(order["describe"]).desc), {}
        if "forget" in order:
            self._states.clear()
            return {}, {}
        inputs = {name: NDArray(array) for name, array in arrays.items()}
        inputs |= {name: self._kept[source] for name, source in order["kept"].items()}
        states = {name: self._state(name, shape, order["dtype"]) for name, shape in order["states"].items()}
        found = await self._find(order["run"])(inputs, states)
        self._kept |= {name: found[name] for name in order["keep"]}
        outputs = {name: found[name].numpy() for name in found if name not in order["keep"]}
        return {}, outputs

    def _find(self, name: str) -> Any:
        if name not in self._functions:
            self._functions[name] = self._model.load_function(name)
        return self._functions[name]

    def _state(self, name: str, shape: list[int], dtype: str) -> Any:
        known = self._states.get(name)
        if known is None or list(known.numpy().shape) != shape:
            fresh = np.zeros(shape, dtype)
            if known is not None:
                both = tuple(slice(0, min(sizes)) for sizes in zip(shape, known.numpy().shape, strict=True))
                fresh[both] = known.numpy()[both]
            self._states[name] = NDArray(fresh)
        return self._states[name]


def _describe(found: Any) -> dict[str, Any]:
    """A function's ports by kind: name, dtype and shape of each."""
    kinds = {
        "inputs": (found.input_names, found.input_descriptor),
        "states": (found.state_names, found.state_descriptor),
        "outputs": (found.output_names, found.output_descriptor),
    }
    return {
        kind: [[name, str(describe(name).dtype), list(describe(name).shape)] for name in names]
        for kind, (names, describe) in kinds.items()
    }
