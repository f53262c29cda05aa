"""What calibration knows of one linear's input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from anequant.quantization.gptq import Factor, factorize
from anequant.quantization.products import product

UNIT_FLOOR = 1e-30


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments over some tokens, float32, of the input x in the model quantized so far and the same
    input x_float in the float model. There is `cross`, or for a linear that reads its input alone `outputs`
    and `paired`, which are smaller.

    hessian  [in, in]   E[x x^T]
    tokens              how many were seen
    cross    [in, in]   E[x_float x^T]
    outputs  [out, in]  E[W x_float x^T], for the one linear W that reads x
    paired   [in]       what the diagonal of `cross` would be
    """

    hessian: Tensor
    tokens: int
    cross: Tensor | None = None
    outputs: Tensor | None = None
    paired: Tensor | None = None

    def project(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return E[W x_float x^T] [rows, in] for some rows of weight [out, in]."""
        if self.outputs is not None:
            return self.outputs[rows]
        assert self.cross is not None
        return product(weight[rows], self.cross)

    @property
    def finite(self) -> bool:
        return all(
            bool(part.isfinite().all())
            for part in (self.hessian, self.cross, self.outputs)
            if part is not None
        )

    def factor(self, damping: float) -> Factor:
        """Return the Hessian's factor. All of them are kept where several linears read the input, which is
        where `cross` is, else the last one."""
        if damping not in self._factors:
            if self.cross is None:
                self._factors.clear()
            self._factors[damping] = factorize(self.hessian, damping)
        return self._factors[damping]

    @cached_property
    def _factors(self) -> dict[float, Factor]:
        return {}


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """`fit` rounds; `held_out`, from other windows, chooses how. `everything` is both together. `coupling`
    [tiles, TILE, TILE] says how errors of outputs count together; None: each by itself."""

    fit: Moments
    held_out: Moments
    coupling: Tensor | None = None

    @cached_property
    def everything(self) -> Moments:
        total = self.fit.tokens + self.held_out.tokens
        share = self.fit.tokens / total

        def combine(part: str) -> Tensor | None:
            held_out, fit = getattr(self.held_out, part), getattr(self.fit, part)
            return None if fit is None else torch.lerp(held_out, fit, share)

        hessian = combine("hessian")
        assert hessian is not None
        return Moments(hessian, total, combine("cross"), combine("outputs"), combine("paired"))

    @property
    def dead_inputs(self) -> int:
        """Inputs that were zero at every token, in the float model or the quantized one."""
        seen = self.everything
        paired = seen.paired if seen.cross is None else seen.cross.diagonal()
        assert paired is not None
        energy = torch.minimum(seen.hessian.diagonal(), paired.abs())
        return int((energy <= UNIT_FLOOR).sum())


def measure_output_loss(rounded: Tensor, wanted: Tensor, hessian: Tensor) -> float:
    """E||W x_float - Q x||^2 up to a constant that does not depend on Q: tr(Q H Q^T) - 2 tr(W C Q^T).

    rounded is Q [out, in], wanted W C [out, in] as of `Moments.wanted`, hessian H [in, in].
    """
    return float((rounded * (product(rounded, hessian) - 2 * wanted)).sum(dtype=torch.float64))
