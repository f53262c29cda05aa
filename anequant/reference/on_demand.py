"""Weights that are in memory only while they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class OnDemand(Mapping[str, Tensor]):
    """Tensors by name, each made whenever it is asked for and kept by nobody here."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def borrow(
    linear: torch.nn.Module, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype
) -> list[RemovableHandle]:
    """Give a linear on the meta device its weight and bias, `name`.weight and `name`.bias of `tensors`, in
    `dtype` when it runs, and take them away after it."""
    arrive = linear.register_forward_pre_hook(partial(_arrive, tensors, name, dtype))
    return [arrive, linear.register_forward_hook(_leave)]


def _arrive(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, linear: torch.nn.Module, arguments: Any
) -> None:
    keys = [key for key in ("weight", "bias") if f"{name}.{key}" in tensors]
    linear.load_state_dict({key: tensors[f"{name}.{key}"].to(dtype) for key in keys}, assign=True)


def _leave(linear: torch.nn.Module, arguments: Any, output: Any) -> None:
    linear.to("meta")
