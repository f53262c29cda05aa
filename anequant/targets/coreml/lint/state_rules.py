"""Rules about states."""

from __future__ import annotations

from collections.abc import Iterator

from anequant.targets.coreml.graph import Graph, Node
from anequant.targets.coreml.lint.chips import Chip
from anequant.targets.shared.finding import ERROR, WARNING, Hit, rule

MOST_STATES = 2
STATE_ALIGNMENT = 32


@rule("T1", ERROR, "states are float16, static, and at most two a function", "use one state for all layers")
def _states(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for state in graph.spec.states:
        if state.dtype != "fp16" or None in state.shape:
            yield Hit(state.name, f"a state in {state.dtype} of shape {list(state.shape)}")
    if len(graph.spec.states) > MOST_STATES:
        yield Hit(graph.function, f"{len(graph.spec.states)} states")


@rule("T2", WARNING, "a state's last axis must divide by 32 (coremltools 2631)", "pad the head size")
def _alignment(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for state in graph.spec.states:
        if (state.shape[-1] or 0) % STATE_ALIGNMENT:
            yield Hit(state.name, f"a last axis of {state.shape[-1]}")


@rule("T3", ERROR, "shifting a state by concat fails to compile", "write a slice at the position")
def _shifts(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("write_state"):
        source = graph.source(node, "data")
        if source is not None and source.kind == "concat":
            yield Hit(source.name, "a state shifted by concat")


@rule(
    "T4",
    WARNING,
    "what is read of a state may reach outputs through its update only (ANEMLL Forge)",
    "write the state first and use what was written",
)
def _stale_reads(graph: Graph, chip: Chip) -> Iterator[Hit]:
    """What a function reads of a state before it writes it, and returns."""
    written = set()
    for node in graph.of_kind("read_state", "write_state"):
        state = node.inputs["input"][0]
        if node.kind == "write_state":
            written.add(state)
        elif state not in written and _reaches_an_output(graph, node):
            yield Hit(node.name, f"an output depends on '{state}' as it was before its update")


def _reaches_an_output(graph: Graph, node: Node) -> bool:
    """Follow values only: a state that is written hands nothing on."""
    reached, later = {node.name}, [node]
    while later:
        current = later.pop()
        if any(output.name in graph.outputs for output in current.outputs):
            return True
        users = [user for user in graph.consumers(current) if user.name not in reached]
        reached.update(user.name for user in users)
        later += users
    return False


STATE_RULES = (_states, _alignment, _shifts, _stale_reads)
