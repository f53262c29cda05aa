"""What Apple's exporter for iOS makes of a model: run by the interpreter that coreai-core is installed for.

    python coreai_models_peer.py MODEL SOURCES OUTPUT [--context 512] [--untie] [--int8-table]

MODEL is the folder of a float qwen2 and SOURCES a work tree of apple/coreai-models; OUTPUT is the folder that
the bundle is written into. It computes in float16 and holds weights as they are. With --untie the model gets
a head of its own, the rows of its embedding in reverse. Seconds, CPU seconds and peak memory are those of the
whole export: reading the model, exporting, saving the asset and what lies beside it.

Three things differ from what Apple's command does. The packages are newer than it asks for (`asked_for`).
Passes that coreai-core no longer has are left out (`changes`). So are the constraints on the memory of
inputs, outputs and states, with which the runtime corrupts memory on Linux; they are told as `constraints`.
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import coreai.authoring  # isort: skip  (before anything that imports its compiler)

from safetensors.torch import load_file, save_file

PACKAGES = ("coreai-core", "coreai-torch", "coreai-opt", "torch", "transformers")
KINDS = ("load_embeddings", "gather_embeddings", "extend", "prompt_opt")
SIZES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
"""What of a configuration decides names and shapes, or which model it is."""

TIME = "a time"
"""What a record says for the time of the export."""

RANDOM_ENDING = re.compile(r"_[a-z]{8}$")
"""What the converter adds to the names of helpers, anew in every run."""


def read_requirements(sources: Path) -> list[str]:
    """Return what Apple's exporter asks for of PACKAGES."""
    lines = re.findall(
        r'^ +"(.+)",$', (sources / "python" / "pyproject.toml").read_text("utf-8"), re.MULTILINE
    )
    return [line for line in lines if re.split("[=<>]", line)[0] in PACKAGES]


def untie(folder: Path, copy: Path) -> Path:
    """Copy a model of one file and give it a head of its own; return the copy."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def leave_out_missing_passes() -> list[str]:
    """Give programs an `optimize` that does nothing, where they have none; return what was changed."""
    if hasattr(coreai.authoring.AIProgram, "optimize"):
        return []
    coreai.authoring.AIProgram.optimize = lambda program: None
    return ["AIProgram.optimize, which this coreai-core lacks, does nothing"]


def leave_out_constraints(model_class: Any) -> list[str]:
    """Have the class of a model declare no constraints on memory; return what was changed."""
    none: dict[str, dict[str, Any]] = {graph: {} for graph in model_class.export_hardware_constraints(1)}
    model_class.export_hardware_constraints = classmethod(lambda cls, most: none)
    return ["export_hardware_constraints gives none"]


def tell_constraints(model_class: Any, context: int) -> dict[str, dict[str, str]]:
    """Return the constraints on memory that Apple declares, by graph and name."""
    return {
        graph: {
            name: f"{found.allocation_type.value}, interleave {list(found.interleave)}, "
            f"alignments {list(found.alignments)}"
            for name, found in constraints.items()
        }
        for graph, constraints in model_class.export_hardware_constraints(context).items()
    }


async def describe(asset: Path) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """Return every function's ports, and the names of helpers, as Apple's runtime tells them in its order."""
    functions, helpers = {}, []
    async with coreai.authoring.AIModelAsset.load(str(asset)).executable() as model:
        for name in model.function_names:
            if not name.startswith(KINDS):
                helpers.append(RANDOM_ENDING.sub("", name))
                continue
            found = model.load_function(name).desc
            functions[name] = {
                "inputs": tell_ports(found.input_names, found.input_descriptor),
                "states": tell_ports(found.state_names, found.state_descriptor),
                "outputs": tell_ports(found.output_names, found.output_descriptor),
            }
    return functions, helpers


def tell_ports(names: list[str], find: Any) -> list[str]:
    """Return name, type and shape of each port, as in `in_step int32 [1]`."""
    return [f"{name} {find(name).dtype} {list(find(name).shape)}" for name in names]


def tell_bundle(bundle: Path, model: Path) -> dict[str, Any]:
    """Return a bundle's files and what its metadata say, with no times, and the model's name for its path."""
    metadata = json.loads((bundle / "metadata.json").read_text(encoding="utf-8"))
    asset = bundle / metadata["assets"]["main"]
    about = json.loads((asset / "metadata.json").read_text(encoding="utf-8"))
    program = hashlib.sha256((asset / "main.mlirb").read_bytes())
    for block, key in (("language", "tokenizer"), ("source", "hf_model_id")):
        assert metadata[block][key] == str(model)
        metadata[block][key] = model.name
    metadata["compilation"]["date"] = about["creationDate"] = TIME
    return {
        "folder": bundle.name,
        "files": sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()),
        "metadata": metadata,
        "asset_metadata": dict(sorted(about.items())),
        "hash_is_sha256_of_program": (asset / "main.hash").read_bytes() == program.digest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("sources", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--untie", action="store_true")
    parser.add_argument("--int8-table", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(options.sources / "python" / "src"))
    from coreai_models.export import ExportConfig, export_model
    from coreai_models.models.ios.qwen2 import Qwen2ForCausalLMForiOS

    constraints = tell_constraints(Qwen2ForCausalLMForiOS, options.context)
    changes = [*leave_out_missing_passes(), *leave_out_constraints(Qwen2ForCausalLMForiOS)]
    folder = options.model
    if options.untie:
        folder = untie(folder, Path(tempfile.mkdtemp()) / folder.name)
    settings = {"variant": "iOS", "compute_precision": "float16", "compression": "none"}
    begun, worked = time.perf_counter(), time.process_time()
    written = export_model(
        ExportConfig(
            str(folder),
            max_context_length=options.context,
            output_dir=str(options.output),
            disable_embedding_quantization=not options.int8_table,
            **settings,
        )
    )
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - worked
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bundle = tell_bundle(Path(written), folder)
    functions, helpers = asyncio.run(describe(Path(written) / bundle["metadata"]["assets"]["main"]))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak": peak,
        "packages": {name: version(name) for name in PACKAGES},
        "asked_for": read_requirements(options.sources),
        "changes": changes,
        "configuration": {name: config[name] for name in SIZES},
        "settings": settings,
        "ladder": list(Qwen2ForCausalLMForiOS.IOS_STATIC_QUERY_LENS),
        "smallest_context": Qwen2ForCausalLMForiOS.IOS_STATIC_MIN_CACHE_LEN,
        "constraints": constraints,
        "bundle": bundle,
        "tied": config["tie_word_embeddings"],
        "helpers": helpers,
        "functions": functions,
    }
    print(json.dumps(found), flush=True)
    os._exit(0)  # coreai-core may abort at exit, after everything is done


if __name__ == "__main__":
    main()
