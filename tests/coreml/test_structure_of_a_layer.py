"""One decoder layer as we emit it against the same layer traced and converted by coremltools.

The traced layer is written in ANEMLL's style (1x1 convolutions, layer_norm of concat(x, -x), a slice written
into a state). Every difference in the number of operations is listed with its reason.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import traced_peer
from random_checkpoint import HEAD_DIM, HIDDEN, INTERMEDIATE, KV_HEADS

from anequant.coreml.graph import Graph, Node, package_graphs
from anequant.coreml.toolkit import ct
from anequant.pipeline.lower import LowerOptions, lower

CONTEXT = 64


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Without fuse_conv_scale, which would fold scales that the style keeps apart."""
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes({"common::fuse_conv_scale"})
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "hidden_states": ((1, 1, HIDDEN), np.float16),
        "position_ids": ((1,), np.int32),
        "causal_mask": ((1, 1, 1, CONTEXT), np.float16),
        "current_pos": ((1,), np.int32),
    }
    examples = tuple(
        torch.zeros(shape, dtype=torch.int32 if dtype is np.int32 else torch.float32)
        for shape, dtype in shapes.values()
    )
    state = ct.TensorType(shape=(2, KV_HEADS, CONTEXT, HEAD_DIM), dtype=np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.convert(
            torch.jit.trace(traced_peer.Stack(1, CONTEXT).eval(), examples),
            inputs=[ct.TensorType(name, shape=shape, dtype=dtype) for name, (shape, dtype) in shapes.items()],
            outputs=[ct.TensorType("output_hidden_states", dtype=np.float16)],
            states=[ct.StateType(wrapped_type=state, name="kv_cache")],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            pass_pipeline=pipeline,
        )
    path = tmp_path_factory.mktemp("traced") / "layer.mlpackage"
    model.save(str(path))
    (graph,) = package_graphs(path)
    return graph


@pytest.fixture(scope="module")
def ours(
    make_model: Callable[..., Path],
    quantize_model: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Graph:
    """A layer of the same shape; with output scales only, as the traced one has no scales at all."""
    folder = tmp_path_factory.mktemp("ours")
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HIDDEN // HEAD_DIM,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 1,
        "vocab_size": 112,
    }
    model = make_model(folder / "model", "qwen2", False, **sizes)
    checkpoint = quantize_model(model, "w4-nearest", scales="output").folder
    lower(checkpoint, folder / "out", LowerOptions(CONTEXT, 16))
    graphs = package_graphs(folder / "out" / "qwen25_FFN_PF_lut4_chunk_01of01.mlpackage")
    return next(graph for graph in graphs if graph.function == "infer")


DIFFERENCES: dict[str, tuple[int, str]] = {
    "add": (2, "q, k and v biases follow their scales (3); traced wraps negative positions (1)"),
    "cast": (-4, "traced narrows positions to 16 bits for its gathers"),
    "concat": (1, "one mask row for all query heads of a group"),
    "expand_dims": (2, "cos and sin get their head axis once a function, not by broadcasting"),
    "greater_equal": (-1, "traced wraps negative positions, there are none"),
    "maximum": (1, "the runtime's -inf mask becomes -1e4"),
    "mul": (4, "seven output scales; three norm gains are folded into the weights"),
    "reshape": (1, "attended heads are split before they are flattened, as prefill needs"),
    "select": (-1, "traced wraps negative positions, there are none"),
    "slice_by_index": (-3, "the norm's half by split"),
    "split": (3, "the norm's half by split"),
}
"""By kind: ours less traced, and why."""


def count(graph: Graph) -> Counter[str]:
    return Counter(node.kind for node in graph.computing())


def test_every_difference_is_explained(ours: Graph, traced: Graph) -> None:
    mine, theirs = count(ours), count(traced)
    kinds = sorted(mine.keys() | theirs.keys())
    measured = {kind: mine[kind] - theirs[kind] for kind in kinds if mine[kind] != theirs[kind]}
    assert measured == {kind: difference for kind, (difference, _) in DIFFERENCES.items()}
    assert all(why for _, why in DIFFERENCES.values())
    for kind in ("conv", "layer_norm", "softmax", "matmul", "silu", "slice_update", "write_state", "gather"):
        assert mine[kind] == theirs[kind] > 0


def attributes(graph: Graph, node: Node, *names: str) -> list[Any]:
    values = [graph.value(node, name) for name in names]
    return [value.tolist() if isinstance(value, torch.Tensor) else value for value in values]


def test_convolutions_have_the_same_form(ours: Graph, traced: Graph) -> None:
    forms, shapes = [], []
    for graph in (ours, traced):
        nodes = list(graph.of_kind("conv"))
        names = ("strides", "pad_type", "dilations", "groups")
        forms.append({tuple(map(str, attributes(graph, node, *names))) for node in nodes})
        shapes.append(sorted((graph.shape(node, "weight"), node.outputs[0].shape) for node in nodes))
        assert all(node.outputs[0].dtype == "fp16" for node in nodes)
    assert forms[0] == forms[1] and len(forms[0]) == 1
    assert shapes[0] == shapes[1]
    assert all(ours.source(node, "weight").kind == "constexpr_lut_to_dense" for node in ours.of_kind("conv"))  # type: ignore[union-attr]


def test_norms_and_attention_compute_the_same(ours: Graph, traced: Graph) -> None:
    for graph, axis in ((ours, 1), (traced, 3)):
        for node in graph.of_kind("layer_norm"):
            size = node.outputs[0].shape[axis]
            assert size == 2 * HIDDEN
            axes, epsilon = attributes(graph, node, "axes", "epsilon")
            assert [value % 4 for value in axes] == [axis]
            assert epsilon == pytest.approx(1e-6, rel=0.03)
            source = graph.source(node, "x")
            assert source is not None and source.kind == "concat"
        (softmax,) = graph.of_kind("softmax")
        assert attributes(graph, softmax, "axis")[0] % 4 == 3
        assert softmax.outputs[0].shape[-1] == CONTEXT
        first, second = graph.of_kind("matmul")
        assert attributes(graph, first, "transpose_y") == [True]
        assert attributes(graph, second, "transpose_y") == [False]


def test_inputs_outputs_and_state_are_the_same(ours: Graph, traced: Graph) -> None:
    for part in ("inputs", "outputs"):
        mine, theirs = (set(getattr(graph.spec, part)) for graph in (ours, traced))
        assert mine == theirs
    (mine,), (theirs,) = ours.spec.states, traced.spec.states
    assert (
        (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape) == ("fp16", (2, KV_HEADS, CONTEXT, HEAD_DIM))
    )
    for graph in (ours, traced):
        for node in graph.of_kind("slice_update"):
            assert graph.shape(node, "update") == (1, KV_HEADS, 1, HEAD_DIM)
