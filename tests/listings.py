"""Listings of functions as Apple's parser would tell them, made by hand: types are spelled as MLIR does."""

from __future__ import annotations

from typing import Any

from anequant.targets.coreai.listing import ListedFunction, make_listing

H, LAYERS, KEYS, VOCABULARY = 128, 2, 64, 512


class Program:
    """A function of some inputs; an operation is added by `op`, which returns the number of its result."""

    def __init__(self, name: str = "main", **inputs: str) -> None:
        self.name, self.inputs, self.types = name, inputs, list(inputs.values())
        self.operations: list[list[Any]] = []
        self.outputs: dict[str, str] = {}

    def op(self, kind: str, *operands: int, type: str = "tensor<1x128x1x64xf16>") -> int:
        return self._add([f"coreai.{kind}", list(operands)], type)

    def constant(self, type: str = "tensor<1x128x1x64xf16>", **given: Any) -> int:
        number = self._add(["coreai.constant", []], type)
        self.operations[-1].append(given)
        return number

    def give(self, **outputs: str) -> Program:
        self.outputs |= outputs
        return self

    def content(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "public": True,
            "inputs": [[name, type] for name, type in self.inputs.items()],
            "outputs": [[name, type] for name, type in self.outputs.items()],
            "values": list(range(len(self.types))),
            "operations": self.operations,
        }

    def _add(self, entry: list[Any], type: str) -> int:
        self.types.append(type)
        self.operations.append([*entry, [len(self.types) - 1]])
        return len(self.types) - 1


def listing(*programs: Program) -> tuple[ListedFunction, ...]:
    found: list[ListedFunction] = []
    for program in programs:
        found += make_listing({"types": program.types, "functions": [program.content()]})
    return tuple(found)


def contract(
    contexts: tuple[int, ...] = (256, 512), windows: tuple[int, ...] = (8, 64)
) -> dict[str, Program]:
    """The functions that Apple's runner asks for, by name, without what they compute."""
    table = f"tensor<{VOCABULARY}x1x{H}xf16>"
    programs = [Program("load_embeddings").give(embedding_table=table)]
    for length in windows:
        gather = Program(
            f"gather_embeddings_{length}",
            in_new_token_ids=f"tensor<1x{length}xsi32>",
            embedding_table=table,
        )
        programs.append(gather.give(gathered_embeddings=f"tensor<1x{length}x1x{H}xf16>"))
        for context in contexts:
            programs += [transformer(kind, context, length) for kind in ("extend", "prompt_opt")]
    return {program.name: program for program in programs}


def transformer(kind: str, context: int, length: int, keys: int = KEYS) -> Program:
    cache = f"!coreai.handle<tensor<{LAYERS}x1x{keys}x1x{context}xf16>>"
    program = Program(
        f"{kind}_{context}_{length}",
        transformer_input=f"tensor<1x{length}x1x{H}xf16>",
        position_ids=f"tensor<1x{length}xui16>",
        in_step="tensor<1xsi32>",
        causal_mask=f"tensor<1x{context}x1x{length}xf16>",
        key_cache=cache,
        value_cache=cache,
    )
    logits = f"tensor<1x1x{length}x{VOCABULARY}xf16>" if kind == "extend" else "tensor<f16>"
    return program.give(key_cache="!coreai.token", value_cache="!coreai.token", out_logits=logits)


def functional(kind: str, context: int, length: int) -> Program:
    """The form in which the host keeps the caches."""
    program = transformer(kind, context, length)
    del program.inputs["in_step"]
    program.inputs["causal_mask"] = f"tensor<1x{context + length}x1x{length}xf16>"
    for name in ("key_cache", "value_cache"):
        program.inputs[name] = f"tensor<{LAYERS}x1x{KEYS}x1x{context}xf16>"
        del program.outputs[name]
    if kind == "prompt_opt":
        program.outputs.clear()
    new = f"tensor<{LAYERS}x1x{KEYS}x1x{length}xf16>"
    program.types = list(program.inputs.values())
    return program.give(new_k=new, new_v=new)
