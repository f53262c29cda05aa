"""The check that folding and rotation did not change the model, made on every run before it is trusted.

Two hidden states walk through transformers' layers side by side: one through the checkpoint's own tensors, as
its config.json has them, one through the folded and rotated ones, as the written config.json will have them.
Only the logits are compared, since the streams differ by R1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anequant.architectures import read_spec
from anequant.architectures.spec import EMBEDDING
from anequant.checkpoints.online_config import build_plain_config
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import InputError, VerificationError
from anequant.quantization.online import NOTHING, Online
from anequant.reference.forward import ReferenceModel
from anequant.rotation.fold import rotate_embedding
from anequant.rotation.rotation_plan import RotationPlan

PROBE_LENGTH = 32
PROBE_SEED = 20
TOLERANCE = 1e-5


class EquivalenceProbe:
    """Runs one window of random tokens in float64; feed it every layer in order, then the head's rows."""

    def __init__(self, checkpoint: Checkpoint, plan: RotationPlan, online: Online = NOTHING) -> None:
        generator = torch.Generator().manual_seed(PROBE_SEED)
        tokens = torch.randint(checkpoint.spec.vocab_size, (PROBE_LENGTH,), generator=generator).tolist()
        name = f"{EMBEDDING}.weight"
        embedded = torch.cat([checkpoint.read(name, slice(token, token + 1)) for token in tokens])[None]
        self._model = ReferenceModel(checkpoint.spec, torch.float64, checkpoint.online)
        written = read_spec(
            build_plain_config(checkpoint.spec.config), str(checkpoint.folder / "config.json")
        )
        self._rotated_model = ReferenceModel(written, torch.float64, online.rotations)
        self._where = str(checkpoint.folder)
        self._original = embedded.double()
        self._rotated = rotate_embedding(embedded, plan)
        self._largest = self._difference = torch.zeros((), dtype=torch.float64)

    def layer(self, layer: int, original: Mapping[str, Tensor], rotated: Mapping[str, Tensor]) -> None:
        self._original = self._model.run_layer(layer, original, self._original)
        self._rotated = self._rotated_model.run_layer(layer, rotated, self._rotated)

    def final_norm(self, gain: Tensor) -> None:
        self._original = self._model.final_norm(self._original, gain)
        self._rotated = self._rotated_model.final_norm(self._rotated, torch.ones_like(gain))

    def head(self, original: Tensor, rotated: Tensor) -> None:
        """Compare the logits of some rows of the head, each [rows, hidden_size]."""
        logits = self._original @ original.double().T
        self._largest = torch.maximum(self._largest, logits.abs().max())
        difference = (logits - self._rotated @ rotated.double().T).abs().max()
        self._difference = torch.maximum(self._difference, difference)

    def relative_error(self) -> float:
        """Return the largest logit difference over the largest logit; raises VerificationError above 1e-5,
        InputError for a model whose own logits are not finite or all zero."""
        if not 0 < float(self._largest) < float("inf"):
            what = "all zero" if not self._largest else "not finite"
            raise InputError(
                f"the model's own logits are {what}",
                where=self._where,
                remedy="check the checkpoint for a damaged tensor",
            )
        error = float(self._difference / self._largest)
        if not error <= TOLERANCE:
            raise VerificationError(
                f"folding and rotation changed the logits by {error:.2e} relative, more than {TOLERANCE:.0e}",
                remedy="report this with the model's config.json",
            )
        return error
