"""The files beside a checkpoint's weights: config, rotations, tokenizer, card and manifest."""

from __future__ import annotations

from dataclasses import dataclass

from anequant.checkpoints.manifest import CHECKPOINT, ROTATED, build_published_config, write_manifest
from anequant.checkpoints.side_files import copy_tokenizer
from anequant.checkpoints.writer import write_json
from anequant.jobs.control import Progress
from anequant.jobs.step import Step
from anequant.outputs.card import write_checkpoint_card, write_rotated_card
from anequant.outputs.records import calibration_record, source_record
from anequant.pipeline.quantizing import Quantizing
from anequant.pipeline.steps.sizes import Facts
from anequant.recipe_files import ROTATION_KEYS
from anequant.reference.judge import check_written


@dataclass(frozen=True, eq=False)
class WriteBeside(Step[Quantizing, None]):
    """Write what lies beside the weights, and hash the source's files and those that were written."""

    stage = "quantize"
    kind = "checkpoint files"

    facts: Facts

    @property
    def moves(self) -> tuple[int, int]:
        return self.facts.source_size + self.facts.written_size, 0


class WriteCheckpointFiles(WriteBeside):
    """Write what lies beside the weights of a quantized checkpoint, and have transformers judge it all."""

    def run(self, state: Quantizing, progress: Progress) -> None:
        request, folder, result = state.request, state.folder, state.result
        errors = result.rounding
        state.write_config(folder)
        state.write_rotations()
        published = build_published_config(state.spec, state.recipe, len(errors.tensors), errors.summary())
        write_json(folder / "quantization_config.json", published)
        copy_tokenizer(request.source.folder, folder)
        seen = calibration_record(request.calibration, state.tokens)
        write_checkpoint_card(folder, request, seen)
        contents = {
            "recipe": request.recipe.to_dict(),
            "calibration": seen,
            "source": source_record(request.source, state.checkpoint.files),
            "measured": result.to_dict(),
        }
        write_manifest(folder, CHECKPOINT, contents)
        check_written(state.checkpoint, folder)


class WriteRotatedFiles(WriteBeside):
    """Write what lies beside the weights of a rotated checkpoint, and have transformers judge it all."""

    def run(self, state: Quantizing, progress: Progress) -> None:
        request, folder, result = state.request, state.folder, state.rotate_result
        state.write_config(folder)
        state.write_rotations()
        copy_tokenizer(request.source.folder, folder)
        seen = calibration_record(request.calibration, state.tokens)
        write_rotated_card(folder, request, seen, result.equivalence)
        contents = {
            "recipe": {key: getattr(request.recipe, key) for key in ROTATION_KEYS},
            "calibration": seen,
            "source": source_record(request.source, state.checkpoint.files),
            "measured": result.to_dict(),
        }
        write_manifest(folder, ROTATED, contents)
        check_written(state.checkpoint, folder)
