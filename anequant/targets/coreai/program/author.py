"""A design becomes an asset that Apple's package has written, with placeholders for its constants."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anequant.targets.coreai.coreai_toolkit import AIProgram, GraphOp, HandleType, Location, Module
from anequant.targets.coreai.design import (
    GATHER,
    LOAD,
    Design,
    FunctionPorts,
    list_functions,
)
from anequant.targets.coreai.program.builder import Builder, make_placeholders, make_type
from anequant.targets.coreai.program.transformer import Transformer, emit_gather, emit_table


def author(design: Design, asset: Path) -> None:
    """Write the folder `asset`, which ends in .aimodel; its bytes depend on the design alone, but for the
    date in metadata.json."""
    module = Module.create()
    with module._block_context(), Location.unknown():
        attributes = make_placeholders(design.constants)
        for ports in list_functions(design):
            _emit_function(design, ports, attributes)
    AIProgram(module).save_asset(asset)


def _emit_function(design: Design, ports: FunctionPorts, attributes: Mapping[str, Any]) -> None:
    types = [make_type(port.dtype, port.shape) for port in ports.inputs]
    types += [HandleType.get(make_type(port.dtype, port.shape)) for port in ports.states]
    names = [port.name for port in (*ports.inputs, *ports.states)]
    graph = GraphOp(ports.name, types, [], input_names=names)
    with graph.block:
        arguments = dict(zip(names, graph.arguments, strict=True))
        outputs = _emit_body(Builder(design, attributes), ports, arguments)
        graph.set_outputs_spec_from_dict(OrderedDict(outputs))


def _emit_body(builder: Builder, ports: FunctionPorts, arguments: Mapping[str, Any]) -> dict[str, Any]:
    if ports.kind == LOAD:
        return emit_table(builder)
    if ports.kind == GATHER:
        return emit_gather(builder, arguments)
    return Transformer(builder, ports.kind, ports.length).emit(arguments)
