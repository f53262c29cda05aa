"""One decoder layer as we emit it against the same layer traced in torch and converted by coremltools.

The traced layer is written in ANEMLL's style: scales around 1x1 convolutions, layer_norm of concat(x, -x),
repeated key-value heads, slices written into a buffer. Every difference is listed with its reason.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Quantized
from torch import Tensor, nn
from torch.nn import functional

from anequant.architectures.spec import ModelSpec
from anequant.checkpoints.layers import QuantizedLayer, load_layer, open_quantized
from anequant.quantization.linear import QuantizedLinear
from anequant.targets.coreml.graph import Graph, Node, read_graphs
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.program.decoder import STATE, chunk_program
from anequant.targets.coreml.program.package import save_package
from anequant.targets.coreml.signatures import TensorSpec
from anequant.targets.coreml.storage import find_model_file, read_model
from anequant.targets.coreml.toolkit import ct
from anequant.targets.shared.geometry import Geometry
from anequant.targets.shared.package_task import Chunk
from anequant.targets.shared.rope_tables import compute_rope_tables

CONTEXT, BATCH, LAYER = 32, 8, 1
LENGTHS = {"infer": 1, "prefill": BATCH}


class Projection(nn.Module):
    def __init__(self, quantized: QuantizedLinear) -> None:
        super().__init__()
        rows, columns = quantized.codes.shape
        self.input_scale = quantized.input_scale.reshape(1, columns, 1, 1)
        self.output_scale = quantized.output_scale.reshape(1, rows, 1, 1)
        self.conv = nn.Conv2d(columns, rows, 1, bias=quantized.bias is not None)
        self.conv.weight.data = quantized.codebook[quantized.codes.int()].reshape(rows, columns, 1, 1)
        if self.conv.bias is not None and quantized.bias is not None:
            self.conv.bias.data = quantized.bias / quantized.output_scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x * self.input_scale)
        return y * self.output_scale


class Norm(nn.Module):
    def __init__(self, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.gain, self.size, self.eps = gain.float(), gain.numel(), eps

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        normed = functional.layer_norm(torch.cat((rows, -rows), dim=-1), (2 * self.size,), eps=self.eps)
        return (normed[..., : self.size] * self.gain).permute(0, 3, 1, 2)


class Layer(nn.Module):
    kv_cache_0: Tensor

    def __init__(self, spec: ModelSpec, layer: QuantizedLayer, cos: Tensor, sin: Tensor, length: int) -> None:
        super().__init__()
        self.spec, self.row, self.cos, self.sin, self.length = spec, layer.index, cos, sin, length
        self.norms = nn.ModuleList(Norm(layer.gains[name], spec.rms_norm_eps) for name in spec.norms)
        self.linears = nn.ModuleDict(
            {name.split(".")[1]: Projection(linear) for name, linear in layer.linears.items()}
        )
        cache = torch.zeros(2 * spec.num_layers, spec.num_key_value_heads, CONTEXT, spec.head_dim)
        self.register_buffer("kv_cache_0", cache)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(1, -1, self.spec.head_dim, self.length).permute(0, 1, 3, 2)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def repeated(self, x: Tensor) -> Tensor:
        group = self.spec.num_heads // self.spec.num_key_value_heads
        return x[:, :, None].expand(-1, -1, group, -1, -1).reshape(1, -1, CONTEXT, self.spec.head_dim)

    def attend(self, x: Tensor, positions: Tensor, mask: Tensor, start: Tensor) -> Tensor:
        cos, sin, length = self.cos[positions], self.sin[positions], self.length
        query = self.rotated(self.heads(self.linears["q_proj"](x)), cos, sin)
        key = self.rotated(self.heads(self.linears["k_proj"](x)), cos, sin)
        cache, row, value_row = self.kv_cache_0, self.row, self.spec.num_layers + self.row
        cache[row : row + 1, :, start : start + length, :] = key
        cache[value_row : value_row + 1, :, start : start + length, :] = self.heads(self.linears["v_proj"](x))
        keys, values = self.repeated(cache[row : row + 1]), self.repeated(cache[value_row : value_row + 1])
        scores = query @ keys.transpose(-1, -2) * self.spec.head_dim**-0.5
        attended = torch.softmax(scores + mask, dim=-1) @ values
        y: Tensor = self.linears["o_proj"](attended.permute(0, 1, 3, 2).reshape(1, -1, 1, length))
        return y

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor, start: Tensor) -> Tensor:
        x = hidden.permute(0, 2, 1).unsqueeze(2)
        attention_norm, mlp_norm = self.norms
        x = x + self.attend(attention_norm(x), positions, mask, start)
        normed = mlp_norm(x)
        gate = functional.silu(self.linears["gate_proj"](normed))
        down: Tensor = self.linears["down_proj"](gate * self.linears["up_proj"](normed))
        return (x + down).squeeze(2).permute(0, 2, 1)


class Nested(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        y: Tensor = self.model(*inputs)
        return y


def convert(layer: Layer, path: Path) -> None:
    """Without fuse_conv_scale, which folds scales into weights and so breaks codebooks up."""
    length, pipeline = layer.length, ct.PassPipeline.DEFAULT
    pipeline.remove_passes({"common::fuse_conv_scale"})
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "hidden_states": ((1, length, layer.spec.hidden_size), np.float16),
        "position_ids": ((length,), np.int32),
        "causal_mask": ((1, 1, length, CONTEXT), np.float16),
        "current_pos": ((1,), np.int32),
    }
    examples = tuple(
        torch.zeros(shape, dtype=torch.int32 if dtype is np.int32 else torch.float32)
        for shape, dtype in shapes.values()
    )
    state = ct.TensorType(shape=layer.kv_cache_0.shape, dtype=np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.convert(
            torch.jit.trace(Nested(Nested(layer)).eval(), examples),
            inputs=[ct.TensorType(name, shape=shape, dtype=dtype) for name, (shape, dtype) in shapes.items()],
            outputs=[ct.TensorType("output_hidden_states", dtype=np.float16)],
            states=[ct.StateType(wrapped_type=state, name="model.model.kv_cache_0")],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            pass_pipeline=pipeline,
        )
    model.save(str(path))
    layer.kv_cache_0.zero_()


@dataclass(frozen=True)
class Pair:
    """Two packages of one layer; `layer` is the traced one in float32."""

    function: str
    layer: Layer
    ours: Path
    traced: Path

    @property
    def graphs(self) -> tuple[Graph, Graph]:
        (traced,) = read_graphs(self.traced)
        return next(graph for graph in read_graphs(self.ours) if graph.function == self.function), traced


@pytest.fixture(scope="module", params=LENGTHS)
def pair(
    request: pytest.FixtureRequest,
    make_model: Callable[..., Path],
    quantize_model: Callable[..., Quantized],
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    """Gains of a layer not yet folded, so that both have something to multiply by."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(folder / "model", "qwen2", False, num_hidden_layers=LAYER + 1)
    checkpoint = open_quantized(quantize_model(model, "w4-nearest").folder)
    spec, layer = checkpoint.spec, load_layer(checkpoint, LAYER)
    generator = torch.Generator().manual_seed(0)
    gains = {name: torch.rand(gain.shape, generator=generator).add(0.5) for name, gain in layer.gains.items()}
    layer = replace(layer, gains={name: gain.half() for name, gain in gains.items()})
    tables = compute_rope_tables(spec, CONTEXT)
    ours, traced = folder / "ours.mlpackage", folder / "traced.mlpackage"
    chunk = Chunk(Geometry(spec, CONTEXT, BATCH, *tables), (layer,), None)
    save_package(chunk_program(chunk), ours, {})
    peer = Layer(spec, layer, *tables, LENGTHS[request.param]).requires_grad_(False)
    convert(peer, traced)
    return Pair(request.param, peer, ours, traced)


OPERATIONS: dict[str, tuple[int, int, str]] = {
    "add": (9, 7, "q, k and v biases follow their scales (3); traced wraps negative positions (1)"),
    "cast": (0, 4, "traced narrows positions to 16 bits for its gathers"),
    "concat": (9, 8, "one mask row for every query head of a group"),
    "expand_dims": (3, 3, "cos and sin get their head axis; traced opens an axis to repeat keys and values"),
    "greater_equal": (0, 1, "traced wraps negative positions"),
    "maximum": (1, 0, "the runtime's -inf mask becomes finite"),
    "mul": (24, 26, "the gains of both norms are layer_norm's gamma"),
    "reshape": (6, 6, "query grouped and attended ungrouped; traced merges repeated keys and values"),
    "select": (0, 1, "traced wraps negative positions"),
    "slice_by_index": (2, 4, "the halves of both norms by split"),
    "split": (4, 2, "the halves of both norms by split"),
    "tile": (0, 2, "queries are grouped, not keys and values repeated"),
    "transpose": (8, 10, "cos and sin to channels (2); traced norms to rows and back (4)"),
}
"""What differs in number, or only happens to agree: ours, traced, why."""

ATTRIBUTES: dict[tuple[str, str], tuple[str, str, str]] = {
    ("conv", "weight"): ("constexpr_lut_to_dense", "const", "traced is palettized after its conversion"),
    ("conv", "bias"): ("absent", "const, absent", "after the scale, a bias takes up no accumulator"),
    ("layer_norm", "axes"): ("[1]", "[3]", "channels stay where convolutions have them"),
    ("layer_norm", "gamma"): ("const", "absent", "saves a multiplication"),
    ("slice_update", "end_mask"): ("absent", "[False, True, False, True]", "ours gives every end"),
    ("any", "dtype"): ("fp16, int32", "bool, fp16, int16, int32, uint16", "traced prepares its gathers"),
    ("any", "rank"): (
        "1, 2, 3, 4",
        "1, 2, 3, 4, 5",
        "traced repeats keys and values on an axis of their own",
    ),
}

SINGLE_POSITION: dict[str, dict[Any, tuple[Any, Any, str]]] = {
    "operations": {
        "reshape": (6, 8, OPERATIONS["reshape"][2] + "; traced turns cos and sin for its query"),
        "transpose": (8, 9, OPERATIONS["transpose"][2] + "; its query stays in channels up to the matmul"),
    },
    "attributes": {("matmul", "transpose_x"): ("False", "True, False", "traced query stays in channels")},
}
"""What coremltools moves only where the axis of positions is 1 long."""

COMPARED = {
    "conv": ("weight", "bias", "strides", "pad_type", "pad", "dilations", "groups"),
    "layer_norm": ("axes", "epsilon", "gamma", "beta"),
    "softmax": ("axis",),
    "matmul": ("transpose_x", "transpose_y"),
    "gather": ("axis", "batch_dims", "validate_indices"),
    "slice_update": ("begin_mask", "end_mask", "squeeze_mask", "stride"),
}
DEFAULTS = {"begin_mask": [False] * 4, "squeeze_mask": [False] * 4, "stride": [1] * 4}


def count(graph: Graph) -> Counter[str]:
    return Counter(node.kind for node in graph.computing() if node.kind != "identity")


def attribute(graph: Graph, node: Node, name: str) -> str:
    if name not in node.inputs:
        return str(DEFAULTS.get(name, "absent"))
    if name in ("weight", "bias", "gamma", "beta"):
        source = graph.source(node, name)
        return "computed" if source is None else source.kind
    value = graph.value(node, name)
    if not isinstance(value, Tensor):
        return str(value)
    return str((value % len(node.outputs[0].shape) if name in ("axis", "axes") else value).tolist())


def attributes(graph: Graph) -> dict[tuple[str, str], str]:
    """The distinct values of each, in the order of the program."""
    found = {
        (kind, name): dict.fromkeys(attribute(graph, node, name) for node in graph.of_kind(kind))
        for kind, names in COMPARED.items()
        for name in names
    }
    outputs = [output for node in graph.computing() for output in node.outputs]
    found["any", "dtype"] = dict.fromkeys(sorted(output.dtype for output in outputs))
    found["any", "rank"] = dict.fromkeys(
        str(rank) for rank in sorted(len(output.shape) for output in outputs)
    )
    return {key: ", ".join(values) for key, values in found.items()}


def check_differences(mine: Any, theirs: Any, explained: Mapping[Any, tuple[Any, Any, str]]) -> None:
    keys = {key for key in mine.keys() | theirs.keys() if mine[key] != theirs[key]} | explained.keys()
    assert {key: (mine[key], theirs[key]) for key in keys} == {key: row[:2] for key, row in explained.items()}
    assert all(why for *_, why in explained.values())


def test_every_difference_in_operations_is_explained(pair: Pair) -> None:
    more = SINGLE_POSITION["operations"] if pair.function == "infer" else {}
    ours, traced = pair.graphs
    check_differences(count(ours), count(traced), OPERATIONS | more)


def test_every_difference_in_attributes_is_explained(pair: Pair) -> None:
    more = SINGLE_POSITION["attributes"] if pair.function == "infer" else {}
    ours, traced = pair.graphs
    check_differences(attributes(ours), attributes(traced), ATTRIBUTES | more)


def test_operations_have_the_same_sizes(pair: Pair) -> None:
    """But for layout: as many numbers from each, and convolutions of the very same shapes."""
    ours, traced = pair.graphs
    for kind in ("conv", "layer_norm", "matmul", "softmax", "silu", "gather", "slice_update"):
        mine, theirs = (
            sorted(math.prod(size or 0 for size in node.outputs[0].shape) for node in graph.of_kind(kind))
            for graph in (ours, traced)
        )
        assert mine == theirs != []
    convolutions, traced_ones = (
        [(graph.shape(node, "x"), graph.shape(node, "weight")) for node in graph.of_kind("conv")]
        for graph in (ours, traced)
    )
    assert convolutions == traced_ones


def test_interfaces_are_the_same(pair: Pair) -> None:
    """Names, shapes and types of inputs, outputs and state, in the program and its description; the opset."""
    ours, traced = pair.graphs
    assert ours.spec == traced.spec
    spec = pair.layer.spec
    shape = (2 * spec.num_layers, spec.num_key_value_heads, CONTEXT, spec.head_dim)
    assert ours.spec.states == (TensorSpec(STATE, "fp16", shape),)
    mine, theirs = (read_model(find_model_file(path)) for path in (pair.ours, pair.traced))
    assert mine.specificationVersion == theirs.specificationVersion
    opsets = [
        model.mlProgram.functions[name].opset for model, name in ((mine, pair.function), (theirs, "main"))
    ]
    assert opsets == ["CoreML8"] * 2
    (described,) = (part for part in mine.description.functions if part.name == pair.function)
    for part in ("input", "output", "state"):
        assert list(getattr(described, part)) == list(getattr(theirs.description, part)) != []


def test_outputs_and_states_agree(pair: Pair) -> None:
    """Three calls that share a state, the same weights in both, within what float16 allows."""
    generator = torch.Generator().manual_seed(1)
    ours, traced = Package.open(pair.ours), Package.open(pair.traced)
    my_state, their_state = ours.new_state(), traced.new_state()
    length, hidden_size = pair.layer.length, pair.layer.spec.hidden_size
    for start in range(0, 3 * length, length):
        positions = torch.arange(start, start + length, dtype=torch.int32)
        mask = torch.full((1, 1, length, CONTEXT), -torch.inf).triu(start + 1)
        hidden = torch.randn(1, length, hidden_size, generator=generator)
        inputs = {
            "hidden_states": hidden.half(),
            "position_ids": positions,
            "causal_mask": mask.half(),
            "current_pos": positions[:1],
        }
        mine = ours.run(inputs, my_state, pair.function)["output_hidden_states"]
        theirs = traced.run(inputs, their_state)["output_hidden_states"]
        exact = pair.layer(hidden.half().float(), positions, mask, positions[:1])
        assert error(mine, exact) < 3e-3
        assert error(theirs, exact) < 3e-3
        assert error(mine, theirs) < 3e-3
    assert error(my_state[STATE], pair.layer.kv_cache_0) < 1e-3
    assert error(my_state[STATE], their_state[STATE]) < 1e-3


def error(x: Tensor, reference: Tensor) -> float:
    return float((x.float() - reference.float()).norm() / reference.float().norm())
