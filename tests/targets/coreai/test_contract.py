"""The functions of our assets beside those that Apple's own exporter makes of the same model.

Reference: apple_contract.json, which `tools/measure/record_coreai_contract.py` recorded of Apple's exporter
and runtime. coreai-core is not needed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from anequant.checkpoints.source import BUNDLED_MODEL
from anequant.targets.coreai import design as contract
from anequant.targets.coreai.design import (
    EXTEND,
    GATHER,
    LOAD,
    PREFILL,
    Design,
    Sizes,
    TensorPort,
    list_functions,
)
from anequant.targets.coreai.installed import PACKAGE, VERSION

RECORD: dict[str, Any] = json.loads(
    Path(__file__).with_name("apple_contract.json").read_text(encoding="utf-8")
)
LADDER = (8, 16, 64)
KINDS = (LOAD, GATHER, EXTEND, PREFILL)

Functions = dict[str, dict[str, list[str]]]


def name_export(export: dict[str, Any]) -> str:
    return f"{'tied' if export['tied'] else 'untied'}, {export['table']} table"


@pytest.fixture(scope="module")
def ours() -> Functions:
    config = json.loads((BUNDLED_MODEL / "config.json").read_text(encoding="utf-8"))
    sizes = Sizes(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=config["num_attention_heads"],
        key_value_heads=config["num_key_value_heads"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        vocabulary=config["vocab_size"],
        dtype=RECORD["dtype"],
    )
    eps = (config["rms_norm_eps"], config["rms_norm_eps"])
    design = Design(sizes, RECORD["max_context_length"], LADDER, "state", {}, {}, eps)
    return {
        ports.name: {
            "inputs": tell(ports.inputs),
            "states": tell(ports.states),
            "outputs": tell(ports.outputs),
        }
        for ports in list_functions(design)
    }


def tell(ports: Iterable[TensorPort]) -> list[str]:
    return [f"{port.name} {port.dtype} {list(port.shape)}" for port in ports]


def find_table(functions: Functions) -> str:
    (table,) = functions[LOAD]["outputs"]
    return table


def hold_table_in(dtype: str, functions: Functions) -> Functions:
    """The one difference: Apple's table may be of 8-bit integers, ours is of float16."""
    table = find_table(functions)
    name, _, shape = table.split(" ", 2)

    def replace(ports: list[str]) -> list[str]:
        return [f"{name} {dtype} {shape}" if port == table else port for port in ports]

    return {
        function: {kind: replace(listed) for kind, listed in ports.items()}
        for function, ports in functions.items()
    }


@pytest.mark.parametrize("export", RECORD["exports"], ids=name_export)
def test_our_functions_are_apples(export: dict[str, Any], ours: Functions) -> None:
    """Names, inputs, states and outputs in their order, types and shapes."""
    theirs = export["functions"]
    assert theirs == hold_table_in(export["table"], ours)
    assert (theirs == ours) is (export["table"] == RECORD["dtype"])


@pytest.mark.parametrize("export", RECORD["exports"], ids=name_export)
def test_kinds_of_functions_come_in_apples_order(export: dict[str, Any], ours: Functions) -> None:
    """Within a kind Apple's are in the order of text (16, 64, 8), which its host does not look at."""

    def order(names: Iterable[str]) -> list[str]:
        return [kind for name in names for kind in KINDS if name.startswith(kind)]

    assert order(export["functions"]) == order(ours)


def test_all_forms_of_head_and_table_are_recorded() -> None:
    forms = {(export["tied"], export["table"]) for export in RECORD["exports"]}
    assert forms == {(tied, table) for tied in (True, False) for table in ("float16", "int8")}


def test_the_record_is_of_the_versions_that_we_name() -> None:
    assert contract.__doc__ is not None and RECORD["commit"][:7] in contract.__doc__
    assert RECORD["packages"][PACKAGE] == VERSION and RECORD["model"] == BUNDLED_MODEL.name
