# SPDX-License-Identifier: Apache-2.0
"""Which integer each weight becomes: to nearest, or error-compensated (GPTQ, arXiv 2210.17323).

GPTQ fixes the inputs (columns) one after the other, largest Hessian diagonal first, and moves each rounding error to
the columns not yet fixed so that tr((B - W) H (B - W)^T) grows least. The scales are set beforehand from the
original columns, so the order needs no index on disk. Factorization in float64, updates in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import limits

_BLOCK = 64
_TRIANGLE = 256  # triangles of this size are inverted at once


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Float64 copy of a Hessian [in, in] with `damping` times its mean diagonal added; dead inputs get the mean.

    A Hessian of all zeros becomes the identity.
    """
    h = hessian.to(torch.float64, copy=True)
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.eye(h.shape[0], dtype=torch.float64, device=h.device)
    diagonal.add_(torch.where(diagonal <= 0, mean, 0.0)).add_(damping * mean)
    return h


def inverse_factor(hessian: Tensor, damping: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Upper Cholesky factor U of the damped inverse, H^-1 = U^T U, [in, in], computed in float64 and given as `dtype`.

    With rows and columns in reverse order H = L L^T and U = L^-1: one factorization and one triangular inverse, in
    place. Damping is raised tenfold, up to the diagonal's mean, where a singular H needs it.

    Raises:
        RuntimeError: H has negative eigenvalues or is not finite.
    """
    while True:
        h = damped(hessian.flip(0, 1), damping)
        try:
            torch.linalg.cholesky(h, out=h)
        except RuntimeError:  # torch.linalg.LinAlgError
            if damping >= 1:
                raise
            damping = min(1.0, max(damping, 1e-4) * 10)
            continue
        invert_triangular(h)
        return h.to(dtype).flip(0, 1)


def invert_triangular(lower: Tensor) -> None:
    """Replace a lower triangular matrix [n, n] by its inverse, halves first: [[A, 0], [B, C]]^-1 has C^-1 B A^-1
    below, negated."""
    size = len(lower)
    if size <= _TRIANGLE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    invert_triangular(lower[:half, :half])
    invert_triangular(lower[half:, half:])
    lower[half:, :half] = -(lower[half:, half:] @ (lower[half:, :half] @ lower[:half, :half]))


@dataclass(frozen=True)
class GptqFactor:
    """A Hessian, prepared once for any number of weights and grids.

    Attributes:
        order: [in], inputs by descending diagonal.
        upper: float32 [in, in], factor of the inverse in that order.
    """

    order: Tensor
    upper: Tensor


def factorize(hessian: Tensor, damping: float = 0.01) -> GptqFactor:
    """Prepare a Hessian [in, in], the inputs' second moment, with `damping` times its mean diagonal added."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return GptqFactor(order, inverse_factor(hessian[order[:, None], order], damping, torch.float32))


def round_gptq(
    weight: Tensor,
    scale: Tensor,
    factor: GptqFactor,
    num_bits: int,
    smooth: Tensor | None = None,
    full_range: bool = False,
) -> Tensor:
    """Integers q, int8 [out, in], that keep tr((B - W) H (B - W)^T) small, B = q * scale / smooth.

    Does not modify its inputs.

    Args:
        weight: W, [out, in].
        scale: [out, groups], final.
        factor: of the Hessian of W's own inputs.
        num_bits: of the grid.
        smooth: [in], divisor of the inputs that the integers will meet; default ones.
        full_range: allow the grid's one integer more.
    """
    low, high = limits(num_bits, full_range)
    order, upper = factor.order, factor.upper
    w = weight.float().t()[order].contiguous()  # [in, out]: a column of the weight is contiguous
    step = scale.float().t().repeat_interleave(weight.shape[1] // scale.shape[1], 0)
    if smooth is not None:
        step = step / smooth[:, None]
    step = step[order]
    q = torch.empty_like(w)
    for start in range(0, len(w), _BLOCK):
        end = min(start + _BLOCK, len(w))
        errors = torch.empty_like(w[start:end])
        for i in range(start, end):
            q[i] = (w[i] / step[i]).round_().clamp_(low, high)
            errors[i - start] = (w[i] - q[i] * step[i]) / upper[i, i]
            w[i + 1 : end].addr_(upper[i, i + 1 : end], errors[i - start], alpha=-1)
        w[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    restored = torch.empty_like(q)
    restored[order] = q
    return restored.t().to(torch.int8).contiguous()
