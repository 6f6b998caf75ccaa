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

FACTOR_DTYPE = torch.bfloat16
ALL_TOKENS = "all"  # key of a patch that serves every token, text too


@dataclass(frozen=True)
class Spectrum:
    """The whitened difference of one group and modality.

    Attributes:
        energies: squared singular values, descending [k], k = min(out, in).
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


def leading_vectors(difference: Tensor, moment: Tensor, rank: int) -> Tensor:
    """The first `rank` output-space singular vectors [out, rank] of A dW^T, float64.

    Block power iteration on dW C dW^T, which is never formed; the whole spectrum where that is no saving. Ten extra
    vectors and eight rounds leave less than a thousandth of the captured energy on the spectra of real weights.
    """
    out_features, in_features = difference.shape
    size = rank + 10
    if 4 * size >= min(out_features, in_features):
        return whitened_spectrum(difference, moment).vectors[:, :rank]
    dw, c = difference.double(), moment.double()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(out_features, size, generator=generator, dtype=torch.float64).to(dw.device)
    for _ in range(8):
        block = torch.linalg.qr(dw @ (c @ (dw.t() @ block)))[0]
    small = dw.t() @ block
    _, rotation = torch.linalg.eigh(small.t() @ (c @ small))
    return block @ rotation.flip(1)[:, :rank]


def low_rank_patch(difference: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Factors a [rank, in] and b [out, rank], float64, of the patch on the singular vectors [out, rank]."""
    return vectors.t() @ difference.double(), vectors


def rank_for_bytes(budget: float, in_features: int, out_features: int) -> int:
    """Largest rank whose factors fit in `budget` bytes."""
    return min(int(budget // patch_bytes(1, in_features, out_features)), in_features, out_features)


def patch_bytes(rank: int, in_features: int, out_features: int) -> int:
    """Bytes of a patch of that rank."""
    return rank * (in_features + out_features) * torch.finfo(FACTOR_DTYPE).bits // 8
