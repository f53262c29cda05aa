"""The reference model: transformers' own decoder layers, run one layer at a time.

The model is built on the meta device, so it holds no weights; each layer borrows its tensors from the
checkpoint while it runs. Only the rotary module, which has no weights, is real. Memory is one layer and
the hidden states, whatever the model's size, and every architecture is exact by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from anequant.architectures.spec import EMBEDDING, INPUT_SCALES, ModelSpec
from anequant.errors import UnsupportedError
from anequant.jobs.control import Progress, silent
from anequant.quantization.online import NOTHING, Online
from anequant.reference.empty_model import borrow, build_empty_model
from anequant.reference.hooks import ATTENTION_MODULE, attach_all, set_input_scale
from anequant.reference.windows import require_known

WINDOWS_AT_ONCE = 4
HEAD_ROWS = 8192


class Weights(Protocol):
    """What a forward pass reads; a Checkpoint is one."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def online(self) -> Online: ...
    @property
    def head_name(self) -> str: ...
    def read(self, name: str) -> Tensor: ...
    def layer(self, layer: int) -> dict[str, Tensor]: ...
    def final_gain(self) -> Tensor: ...


class _InputReached(Exception):
    """Ends a layer's run at the linear whose input is wanted."""

    def __init__(self, input_: Tensor) -> None:
        super().__init__()
        self.input = input_


def _stop_at_input(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
    raise _InputReached(arguments[0])


def check_window(spec: ModelSpec, length: int) -> None:
    """Raises UnsupportedError when `length` tokens would need a sliding window."""
    if spec.window is not None and length > spec.window:
        raise UnsupportedError(
            f"{length} tokens exceed the model's sliding window of {spec.window}",
            where="config key 'sliding_window'",
            remedy=f"use a length of at most {spec.window}",
        )


class ReferenceModel:
    """transformers' model of a ModelSpec, without weights, which does what `online` says while it runs.

    `dtype` is that of the hidden states. A linear holds its weight in it only while it runs, so a mapping
    that makes tensors when they are asked for bounds memory to one of them.
    A layer's tensors may hold input scales [1, in] beside its weights: where a linear's input is rounded,
    they multiply it before and divide it after.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, online: Online = NOTHING) -> None:
        self._model, _ = build_empty_model(spec)
        attach_all(self._model, spec, online)
        self.linears = [linear.name for linear in spec.architecture.linears]
        self._norms = {
            linear.name.partition(".")[0]: linear.norm for linear in spec.architecture.linears if linear.norm
        }
        self._spec = spec
        self._dtype = dtype
        self._rotary = self._model.model.rotary_emb

    def rope_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin for positions 0 ... length - 1, each [1, length, head_dim], from the model's
        module."""
        with torch.no_grad():
            probe = torch.empty(1, dtype=self._dtype)
            cos, sin = self._rotary(probe, torch.arange(length)[None])
        return cos, sin

    @torch.no_grad()
    def run_layer(self, layer: int, tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Return hidden states [n, length, hidden_size] after decoder layer `layer` with these weights."""
        with self._loaded(layer, tensors, hidden.shape[1]) as run:
            return torch.cat([run(part) for part in torch.split(hidden, WINDOWS_AT_ONCE)])

    @torch.no_grad()
    def inputs(
        self,
        layer: int,
        tensors: Mapping[str, Tensor],
        parts: Sequence[Tensor],
        name: str,
        *,
        arriving: bool = False,
        within: bool = False,
    ) -> Iterator[Tensor]:
        """Yield the input [tokens, in] of the layer's linear `name` for each of the parts [n, length,
        hidden]; the layer runs no further than that.

        arriving  yield it before it is rotated and rounded
        within    the parts are what enters the half of the layer, attention or MLP, that the linear is in
        """
        half = name.partition(".")[0] if within else None
        with self._loaded(layer, tensors, parts[0].shape[1], but=name, half=half) as run:
            linear = self._model.model.layers[layer].get_submodule(name)
            hook = linear.register_forward_pre_hook(_stop_at_input, prepend=arriving)
            try:
                for part in parts:
                    try:
                        run(part)
                    except _InputReached as reached:
                        yield reached.input.flatten(0, 1)
            finally:
                hook.remove()

    @torch.no_grad()
    def every_input(
        self, layer: int, tensors: Mapping[str, Tensor], hidden: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the input [tokens, in] of each of the layer's linears, rotated and rounded, by name; and the
        hidden states [n, length, hidden_size] after the layer, for at most WINDOWS_AT_ONCE windows."""
        found: dict[str, Tensor] = {}

        def keep(name: str, linear: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[name] = arguments[0].flatten(0, 1)

        with self._loaded(layer, tensors, hidden.shape[1]) as run, ExitStack() as hooks:
            for name in self.linears:
                linear = self._model.model.layers[layer].get_submodule(name)
                hooks.enter_context(linear.register_forward_pre_hook(partial(keep, name)))
            return found, run(hidden)

    def gradients(
        self, layer: int, tensors: Mapping[str, Tensor], hidden: Tensor, output_gradient: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return gradients of <output_gradient, layer(hidden)>: for hidden [n, length, hidden_size], n at
        most WINDOWS_AT_ONCE, and for each of the layer's tensors."""
        with self._loaded(layer, tensors, hidden.shape[1], whole=True) as run, torch.enable_grad():
            parameters = dict(self._model.model.layers[layer].named_parameters())
            leaves = [
                hidden.detach().requires_grad_(),
                *(value.requires_grad_() for value in parameters.values()),
            ]
            first, *others = torch.autograd.grad(run(leaves[0]), leaves, output_gradient)
        return first, dict(zip(parameters, others, strict=True))

    def output_gradients(
        self, layer: int, tensors: Mapping[str, Tensor], hidden: Tensor, output_gradient: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return gradients of <output_gradient, layer(hidden)>: for hidden [n, length, hidden_size], n at
        most WINDOWS_AT_ONCE, and for the output [n, length, out] of each of the layer's linears, by name."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str, linear: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = output

        with self._loaded(layer, tensors, hidden.shape[1], whole=True) as run, ExitStack() as hooks:
            for name in self.linears:
                linear = self._model.model.layers[layer].get_submodule(name)
                hooks.enter_context(linear.register_forward_hook(partial(keep, name)))
            self._model.model.layers[layer].requires_grad_(False)
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                result = run(leaf)
            first, *others = torch.autograd.grad(result, [leaf, *outputs.values()], output_gradient)
        return first, dict(zip(outputs, others, strict=True))

    @contextmanager
    def _loaded(
        self,
        layer: int,
        tensors: Mapping[str, Tensor],
        length: int,
        *,
        whole: bool = False,
        but: str | None = None,
        half: str | None = None,
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Provide the layer with these weights, or the half of it of that name without the sum that ends it,
        as a function of hidden states; on meta again afterwards.

        A linear's weight comes when it runs and goes after it, that of the linear `but` never; with `whole`
        all are there from the start.
        """
        check_window(self._spec, length)
        module = self._model.model.layers[layer]
        scales = {f"{name}.{INPUT_SCALES}" for name in self.linears}
        given, due = tensors.keys() - scales, module.state_dict().keys()
        assert given == due, f"a layer's tensors are {sorted(due)}, not {sorted(given)}"
        late = {} if whole else {name: module.get_submodule(name) for name in self.linears}
        now = [name for name in due if name.rpartition(".")[0] not in late]
        module.load_state_dict(
            {name: tensors[name].to(self._dtype) for name in now}, strict=False, assign=True
        )
        hooks: list[RemovableHandle] = []
        for name in self.linears:
            set_input_scale(module.get_submodule(name), tensors.get(f"{name}.{INPUT_SCALES}"))
            if name in late and name != but:
                hooks += borrow(late[name], tensors, name, self._dtype)
        context = {
            "position_embeddings": self.rope_tables(length),
            "position_ids": torch.arange(length)[None],
            "attention_mask": None,
        }

        def run(part: Tensor) -> Tensor:
            result: Tensor
            if half is None:
                result = module(part, **context)
            else:
                normed = module.get_submodule(self._norms[half])(part)
                inner = module.get_submodule(half)
                result = inner(normed, **context)[0] if half == ATTENTION_MODULE else inner(normed)
            return result

        try:
            yield run
        finally:
            for hook in hooks:
                hook.remove()
            module.to("meta")

    def final_norm(self, hidden: Tensor, gain: Tensor) -> Tensor:
        """Normalised hidden states; differentiable in both."""
        weights = {"weight": gain.to(self._dtype)}
        result: Tensor = torch.func.functional_call(self._model.model.norm, weights, (hidden,))
        return result


def run_to_final_states(
    weights: Weights, tokens: Tensor, dtype: torch.dtype = torch.float32, progress: Progress = silent
) -> Tensor:
    """Normalised hidden states [n, length, hidden_size] for tokens [n, length], layer by layer."""
    model = ReferenceModel(weights.spec, dtype, weights.online)
    require_known(tokens.flatten().tolist(), weights.spec.vocab_size)
    hidden = weights.read(f"{EMBEDDING}.weight")[tokens].to(dtype)
    for layer in range(weights.spec.num_layers):
        progress(f"layer {layer + 1}", layer / weights.spec.num_layers)
        hidden = model.run_layer(layer, weights.layer(layer), hidden)
    with torch.no_grad():
        return model.final_norm(hidden, weights.final_gain())


def compute_logits(head: Tensor, hidden: Tensor) -> Tensor:
    """Return logits [..., vocab] of hidden states [..., hidden_size]; the head is widened in row blocks."""
    parts = [hidden @ rows.to(hidden.dtype).T for rows in torch.split(head, HEAD_ROWS)]
    return torch.cat(parts, dim=-1)


def logits(
    weights: Weights, tokens: Tensor, dtype: torch.dtype = torch.float32, progress: Progress = silent
) -> Iterator[Tensor]:
    """Yield logits [length, vocab] of one window after the other."""
    hidden = run_to_final_states(weights, tokens, dtype, progress)
    head = weights.read(weights.head_name)
    for window in hidden:
        yield compute_logits(head, window)
