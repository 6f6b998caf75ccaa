# SPDX-License-Identifier: Apache-2.0
"""Modality-aware smoothing in closed form (arXiv 2603.04800, Eq. 12; SmoothQuant, arXiv 2211.10438).

    s_m,i = absmax_m,i ^ strength / max_j |w_j,i| ^ (1 - strength)

for every modality m and input channel i: the activation becomes x / s_m, the weight W diag(s_m). The maximum over j
runs over all linears of the group, because they share one vector (the paper's code looks at one of them). Between the
vector of all tokens (SmoothQuant) and the modality's own lie geometric means, chosen by `spread`:

    s_m = s_shared^(1 - spread) * s_own,m^spread
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-5


def smooth_scale(absmax: Tensor, weight_absmax: Tensor, strength: float) -> Tensor:
    """Divisor of the input, float32, of the shape of `absmax` [..., in].

    Args:
        absmax: largest magnitude of each input channel over the tokens, [..., in].
        weight_absmax: largest magnitude of each input channel over the group's output rows, [in].
        strength: 0 leaves activations alone, 1 moves their whole range into the weights.

    A channel that is never active or has no weight keeps 1. Scaled to a geometric mean of 1 over the live channels,
    which changes nothing in exact arithmetic and keeps folded norms in range.
    """
    alive = (absmax > 0) & (weight_absmax > 0)
    log = (
        strength * absmax.float().clamp_min(_FLOOR).log()
        - (1 - strength) * weight_absmax.float().clamp_min(_FLOOR).log()
    )
    count = alive.sum(-1, keepdim=True).clamp_min(1)
    log = log - (log * alive).sum(-1, keepdim=True) / count
    return torch.where(alive, log.exp(), 1.0)


def awq_scale(magnitude: Tensor, strength: float) -> Tensor:
    """AWQ's divisor (arXiv 2306.00978, Eq. 4) of an input with mean magnitudes [in]: magnitude ^ strength.

    Scaled so that the largest and the smallest have a product of 1, as its authors do; a channel that is never active
    keeps 1.
    """
    alive = magnitude > 0
    scale = torch.where(alive, magnitude.float().clamp_min(_FLOOR) ** strength, 1.0)
    lively = scale[alive] if bool(alive.any()) else scale
    return torch.where(alive, scale / (lively.max() * lively.min()).sqrt(), 1.0)


def spread_scale(shared: Tensor, own: Tensor, spread: float) -> Tensor:
    """Vectors between the shared one [in] (spread 0) and each modality's own [modalities, in] (spread 1)."""
    return shared * (own / shared) ** spread


def share_across_query_heads(scale: Tensor, num_heads: int, num_key_value_heads: int) -> Tensor:
    """Geometric mean of a vector [.., heads * head_dim] over the query heads that read one key-value head.

    With it the vector can be folded into the rows of the value projection under grouped-query attention.
    """
    head_dim = scale.shape[-1] // num_heads
    repeats = num_heads // num_key_value_heads
    log = scale.log().unflatten(-1, (num_key_value_heads, repeats, head_dim))
    return log.mean(-2, keepdim=True).expand_as(log).flatten(-3).exp()


def exact_norm_fold(norm_weight: Tensor, scale: Tensor, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Folded norm weight and the vector that was really folded, so that their product is exact.

    Args:
        norm_weight: [in], in the model's dtype.
        scale: [in], the vector wanted.
        offset: what the norm adds to its weight before it multiplies with it.

    Returns:
        The new norm weight, in its dtype, and the divisor float32 [in] with (new + offset) * divisor == old + offset;
        1 where the norm's gain is zero (or would become zero).
    """
    gain = norm_weight.float() + offset
    folded = (gain / scale - offset).to(norm_weight.dtype)
    usable = (folded.float() + offset != 0) & folded.isfinite()
    folded = torch.where(usable, folded, norm_weight)
    divisor = torch.where(usable, gain / (folded.float() + offset), 1.0)
    return folded, divisor


def gauge(energy: Tensor, ratio: Tensor) -> float:
    """Scalar g for which the single base weight serves a modality best with the vector g * ratio.

    Per-token and per-row scales make the smoothed product invariant to s_m -> c s_m; the shared base weight is not.
    With r = s_text / s_m the least squares of c X diag(r) W^T ~ X W^T gives g = 1 / c = r^T E r / (1^T E r), where
    E = (X^T X) * (W^T W) elementwise.

    Args:
        energy: E, [in, in].
        ratio: s_m / s_text, [in].
    """
    r = 1.0 / ratio.to(energy.dtype)
    half = energy @ r
    numerator, denominator = float(half.sum()), float(r @ half)
    return denominator / numerator if numerator > 0 and denominator > 0 else 1.0
