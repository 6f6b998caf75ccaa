# SPDX-License-Identifier: Apache-2.0
"""Cross-modal compensation (arXiv 2603.04800, Eq. 22-29): a low-rank patch per modality on one shared weight.

For modality m the shared weight B = Q(W diag(s_text)) misses dW = W diag(s_m) - B. The patch of rank r that loses
least on the modality's own inputs A = X / s_m minimises ||A (dW - b a)^T||_F. With C = A^T A and V_r the leading
eigenvectors of dW C dW^T (the right singular vectors of the whitened difference) it is

    b = V_r [out, r],    a = V_r^T dW [r, in]

the paper's T^-1 Trunc_r(T dW) without an inverse, so that a singular C (fewer tokens than channels) is no special
case. The error left is the sum of the eigenvalues beyond r. One `a` serves all linears of a group: the
eigenvectors are taken over the concatenated output rows. Float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
ALL_TOKENS = "all"  # key of a patch that serves every token, text too


@dataclass(frozen=True)
class Patch:
    """Factors as they are stored: bfloat16, or integers with one scale per rank.

    Attributes:
        a: [rank, in].
        b: [out, rank], with the factor of each row that is folded into it.
        scale: bfloat16 [rank], product of both factors' scales; None for bfloat16.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | None = None

    @classmethod
    def store(cls, a: Tensor, b: Tensor, factors: str) -> Patch:
        """Factors a [rank, in] and b [out, rank] rounded to "bfloat16" or "int8"."""
        if factors == "bfloat16":
            return cls(a.to(torch.bfloat16), b.to(torch.bfloat16))
        scale_a, scale_b = absmax_of(a, 1).flatten(), absmax_of(b, 0).flatten()
        scale = (scale_a * scale_b).to(torch.bfloat16)
        scale_b = scale / scale_a  # b is rounded for the scale that is stored
        return cls(
            (a / scale_a[:, None]).round().to(torch.int8),
            (b / scale_b).round().clamp(-127, 127).to(torch.int8),
            scale,
        )

    @property
    def rank(self) -> int:
        """Columns of b."""
        return self.a.shape[0]

    @property
    def factors(self) -> str:
        """How it is stored: "bfloat16" or "int8"."""
        return "bfloat16" if self.scale is None else "int8"

    @property
    def bytes(self) -> int:
        """Of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in (self.a, self.b, self.scale) if t is not None)

    def output(self, smoothed: Tensor, row_fold: Tensor) -> Tensor:
        """What the patch adds, [tokens, out], for smoothed inputs [tokens, in], before rows get `row_fold` [out]."""
        projected = smoothed @ self.a.float().t()
        if self.scale is not None:
            projected = projected * self.scale.float()
        return projected @ self.b.float().t() / row_fold

    def weight(self, row_fold: Tensor) -> Tensor:
        """What the patch does to smoothed inputs as a weight, float32 [out, in], before rows get `row_fold`."""
        return self.output(torch.eye(self.a.shape[1], device=self.a.device), row_fold).t()


def absmax_of(factor: Tensor, dim: int) -> Tensor:
    """Scale that maps the largest magnitude along `dim` (kept) to 127; 1 where all are zero."""
    scale = factor.double().abs().amax(dim, keepdim=True) / 127
    return torch.where(scale > 0, scale, 1.0)


@dataclass(frozen=True)
class Spectrum:
    """The whitened difference of one group and modality, or its leading part.

    Attributes:
        energies: squared singular values, descending [k], k = min(out, in) or fewer.
        vectors: output-space singular vectors [out, k].
    """

    energies: Tensor
    vectors: Tensor


def whitened_spectrum(difference: Tensor, moment: Tensor) -> Spectrum:
    """Spectrum of A dW^T for dW [out, in] and C = A^T A [in, in]; the cheaper of the two Gram matrices is used."""
    dw, c = difference.double(), moment.double()
    c = (c + c.t()) / 2
    out_features, in_features = dw.shape
    if out_features <= in_features:
        energies, vectors = torch.linalg.eigh(dw @ c @ dw.t())
        return Spectrum(energies.flip(0).clamp_min(0), vectors.flip(1))
    values, basis = torch.linalg.eigh(c)
    whitened = (basis * values.clamp_min(0).sqrt()).t() @ dw.t()  # [in, out]
    energies, left = torch.linalg.eigh(whitened @ whitened.t())
    energies, left = energies.flip(0).clamp_min(0), left.flip(1)
    # Directions without energy stay zero; relative to the largest because eigh is accurate to that.
    floor = energies[0] * 1e-14
    inverse = torch.where(energies > floor, energies.clamp_min(1e-300).rsqrt(), 0.0)
    return Spectrum(torch.where(energies > floor, energies, 0.0), whitened.t() @ left * inverse)


def leading_spectrum(difference: Tensor, moment: Tensor, rank: int) -> Spectrum:
    """The first `rank` singular values and output-space vectors of A dW^T, float64, and some more, less exact.

    Block power iteration on dW C dW^T, which is never formed; the whole spectrum where that is no saving. Ten extra
    vectors and eight rounds leave less than a thousandth of the captured energy on the spectra of real weights.
    """
    out_features, in_features = difference.shape
    size = rank + 10
    if 4 * size >= min(out_features, in_features):
        return whitened_spectrum(difference, moment)
    dw, c = difference.double(), moment.double()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(out_features, size, generator=generator, dtype=torch.float64).to(dw.device)
    for _ in range(8):
        block = torch.linalg.qr(dw @ (c @ (dw.t() @ block)))[0]
    small = dw.t() @ block
    energies, rotation = torch.linalg.eigh(small.t() @ (c @ small))
    return Spectrum(energies.flip(0).clamp_min(0), block @ rotation.flip(1))


def low_rank_patch(difference: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Factors a [rank, in] and b [out, rank], float64, of the patch on the singular vectors [out, rank]."""
    return vectors.t() @ difference.double(), vectors


def rank_for_bytes(budget: float, in_features: int, out_features: int, factors: str) -> int:
    """Largest rank whose factors fit in `budget` bytes."""
    return min(int(budget // rank_bytes(in_features, out_features, factors)), in_features, out_features)


def rank_bytes(in_features: int, out_features: int, factors: str) -> int:
    """Bytes of one rank of a patch stored as "bfloat16" or "int8"."""
    return (in_features + out_features) * FACTOR_DTYPES[factors].itemsize + (2 if factors == "int8" else 0)
