"""gptq and descent for matrices [out, in] and a Hessian, without what the package keeps between the steps."""

from __future__ import annotations

import torch
from torch import Tensor

from anequant.quantization.gptq import Grid, descend, evaluate_codes, factorize, gptq


def gptq_codes(core: Tensor, codebook: Tensor, hessian: Tensor, step: Tensor | None = None) -> Tensor:
    return gptq(_grid(core, codebook, step), factorize(hessian)).T.contiguous()


def descended(
    core: Tensor,
    codebook: Tensor,
    hessian: Tensor,
    codes: Tensor,
    step: Tensor | None = None,
    coupling: Tensor | None = None,
) -> Tensor:
    """One pass. The error and its product with the Hessian, which go along, are right afterwards."""
    grid = _grid(core, codebook, step)
    current = evaluate_codes(grid, hessian, codes.T.contiguous())
    descend(grid, hessian, current, coupling)
    after = evaluate_codes(grid, hessian, current.codes)
    torch.testing.assert_close(current.error, after.error)
    largest = float(hessian.abs().max() * grid.target.abs().max())
    torch.testing.assert_close(current.pull, after.pull, rtol=1e-4, atol=1e-5 * largest)
    return current.codes.T.contiguous()


def _grid(core: Tensor, codebook: Tensor, step: Tensor | None) -> Grid:
    step = torch.ones_like(core) if step is None else step
    return Grid(core.T.contiguous(), step.T.contiguous(), codebook)
