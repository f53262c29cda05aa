"""What a conversion checks and measures before its output takes its name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from anequant.checkpoints.manifest import write_manifest
from anequant.evaluation import SAMPLE_LENGTH, SAMPLE_WINDOWS
from anequant.evaluation.quality import Quality
from anequant.jobs.control import Progress
from anequant.jobs.step import Step, Work
from anequant.lower_options import LowerOptions
from anequant.outputs.card import Checked, write_conversion_card
from anequant.pipeline.converting import Converting, measure_sample
from anequant.pipeline.steps.build_asset import BuildAsset
from anequant.pipeline.steps.build_packages import BuildPackage, count_package_bytes
from anequant.pipeline.steps.sizes import (
    FLOAT16,
    FLOAT32,
    Facts,
    count_compared_bytes,
    count_forward_work,
    count_packing_work,
    count_reference_bytes,
    count_table_weights,
)
from anequant.reference.forward import HEAD_ROWS
from anequant.reference.windows import DECODE_TOKENS, PREFILL_TOKENS
from anequant.targets.coreml.lint.lint import lint
from anequant.targets.shared.agreement import PackageCheck
from anequant.targets.shared.finding import Finding, require_clean
from anequant.targets.shared.geometry import GRAPH_BYTES_PER_LAYER, count_head_parts, split_layers
from anequant.verification.verify import CheckpointCheck, verify_checkpoint, verify_packages

PROBABILITIES = 5
"""Tables [length, vocab] that a comparison of two models' predictions holds at once."""


@dataclass(frozen=True, eq=False)
class VerifyCheckpoint(Step[Converting, CheckpointCheck]):
    """Read the checkpoint back, and compare every weight with what its codes stand for."""

    stage = "verify"
    kind = "verify checkpoint"
    result = CheckpointCheck

    facts: Facts

    @property
    def title(self) -> str:
        return "checkpoint"

    @property
    def moves(self) -> tuple[int, int]:
        return 2 * self.facts.written_size, 0

    @property
    def holds(self) -> int:
        return count_compared_bytes(max(list_quantized_sizes(self.facts)))

    @property
    def cost(self) -> Work:
        return count_packing_work(2 * self.facts.spec.num_layers * self.facts.spec.layer_weights)

    def run(self, state: Converting, progress: Progress) -> CheckpointCheck:
        return verify_checkpoint(state.checkpoint_folder, progress=progress)

    def accept(self, state: Converting, result: CheckpointCheck) -> None:
        state.checkpoint = result

    def tell(self, result: CheckpointCheck) -> Sequence[str]:
        return (f"{result.tensors} weights as stored",)


@dataclass(frozen=True, eq=False)
class VerifyPackages(Step[Converting, PackageCheck]):
    """Read the `packages` back, compare every constant, and run them beside transformers."""

    stage = "verify"
    kind = "verify packages"
    result = PackageCheck

    facts: Facts
    packages: Sequence[BuildPackage]
    options: LowerOptions

    @property
    def title(self) -> str:
        return "packages"

    @property
    def moves(self) -> tuple[int, int]:
        return self.facts.written_size + 2 * count_package_bytes(self.packages), 0

    @property
    def holds(self) -> int:
        """The largest package in float32, transformers' logits, or a constant and what it is held against."""
        spec = self.facts.spec
        chunks = len(self.packages) - 2
        most = max(len(layers) for layers in split_layers(spec.num_layers, chunks))
        parts = count_head_parts(spec)
        return max(
            _count_interpreted_bytes(list(spec.linear_weights.values()) * most),
            _count_interpreted_bytes([count_table_weights(spec) // parts] * parts),
            count_reference_bytes(spec, FLOAT16),
            *(count_compared_bytes(size) + size for size in list_quantized_sizes(self.facts)),
        )

    @property
    def cost(self) -> Work:
        """Constants compared, a prompt and single tokens through the packages, transformers beside them."""
        spec = self.facts.spec
        size = spec.num_layers * spec.layer_weights + count_table_weights(spec)
        steps = min(DECODE_TOKENS, self.options.context)
        tokens = PREFILL_TOKENS + DECODE_TOKENS
        return count_packing_work(2 * size) + Work(2 * 2 * tokens * size, 4 * steps * size)

    def run(self, state: Converting, progress: Progress) -> PackageCheck:
        return verify_packages(state.packages_folder, state.checkpoint_folder, progress=progress)

    def accept(self, state: Converting, result: PackageCheck) -> None:
        state.packages = result

    def tell(self, result: PackageCheck) -> Sequence[str]:
        return (f"arg-max agrees {result.agreement:.1%}",)


@dataclass(frozen=True, eq=False)
class Lint(Step[Converting, tuple[Finding, ...]]):
    """Hold the graphs of the packages to the rules of the Neural Engine."""

    stage = "verify"
    kind = "lint"
    result = tuple[Finding, ...]

    facts: Facts

    @property
    def moves(self) -> tuple[int, int]:
        return GRAPH_BYTES_PER_LAYER * self.facts.spec.num_layers, 0

    def run(self, state: Converting, progress: Progress) -> tuple[Finding, ...]:
        return tuple(require_clean(lint(state.packages_folder)))

    def accept(self, state: Converting, result: tuple[Finding, ...]) -> None:
        state.findings = result


@dataclass(frozen=True, eq=False)
class MeasureQuality(Step[Converting, Quality]):
    """Compare the predictions of the checkpoint and of the float model on a text; both have a tokenizer."""

    stage = "verify"
    kind = "quality"
    result = Quality

    facts: Facts

    @property
    def moves(self) -> tuple[int, int]:
        return self.facts.written_size + self.facts.source_size, 0

    @property
    def holds(self) -> int:
        """Both heads, the rows that are widened, and predictions of one window."""
        spec, source = self.facts.spec, self.facts.source_bytes
        heads = (source + FLOAT16) * count_table_weights(spec)
        window = PROBABILITIES * FLOAT32 * SAMPLE_LENGTH * spec.vocab_size
        states = 2 * FLOAT32 * SAMPLE_WINDOWS * SAMPLE_LENGTH * spec.hidden_size
        rows = FLOAT32 * min(HEAD_ROWS, spec.vocab_size) * spec.hidden_size
        return max(heads + max(window, rows) + states, count_reference_bytes(spec, source))

    @property
    def cost(self) -> Work:
        return count_forward_work(self.facts.spec, (SAMPLE_WINDOWS, SAMPLE_LENGTH), passes=2)

    def run(self, state: Converting, progress: Progress) -> Quality:
        return measure_sample(state.request.checkpoint, state.checkpoint_folder, progress)

    def accept(self, state: Converting, result: Quality) -> None:
        state.quality = result

    def tell(self, result: Quality) -> Sequence[str]:
        return f"KL {result.kl:.4f}", f"top token {result.top1:.1%}"


@dataclass(frozen=True, eq=False)
class WriteConversionFiles(Step[Converting, None]):
    """Write the card and the manifest of the whole conversion, which hashes all of it."""

    stage = "verify"
    kind = "conversion files"

    facts: Facts
    packages: Sequence[BuildPackage]
    asset: BuildAsset | None

    @property
    def moves(self) -> tuple[int, int]:
        asset = 0 if self.asset is None else self.asset.moves[1]
        return self.facts.written_size + count_package_bytes(self.packages) + asset, 0

    def run(self, state: Converting, progress: Progress) -> None:
        result, request = state.result, state.request
        write_conversion_card(state.folder, request, Checked(result.packages, result.asset), result.quality)
        contents = {"recipe": request.recipe.to_dict(), "measured": result.to_dict()}
        write_manifest(state.folder, "conversion", contents)


def list_quantized_sizes(facts: Facts) -> list[int]:
    """Return the number of weights of every quantized tensor."""
    tensors = facts.written.tensors
    codebooks = [name for name in tensors if name.endswith(".codebook")]
    return [math.prod(tensors[f"{name.removesuffix('codebook')}weight"].shape) for name in codebooks]


def _count_interpreted_bytes(sizes: Sequence[int]) -> int:
    """The bytes of a package that the interpreter runs: float32, and the codes of what is being widened."""
    return FLOAT32 * sum(sizes) + 2 * max(sizes)
