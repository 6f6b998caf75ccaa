# SPDX-License-Identifier: Apache-2.0
"""Symmetric integer grids: scales, quantize, dequantize.

A grid of n bits holds the integers -qmax..qmax with qmax = 2^(n-1) - 1 (4 bits: -7..7, 6: -31..31, 8: -127..127);
x is represented by round(x / scale) * scale with scale = absmax / qmax (arXiv 2603.04800, Eq. 1, symmetric). The full
range of n bits has one integer more, -qmax - 1; a scale of either sign puts it on the side where a group needs it
(as llama.cpp's Q4_0 does), which costs no byte: the sign bit of a stored scale is otherwise unused.
Weights: one scale per output row ("channel") or per group of consecutive inputs ("group"), static, stored in
bfloat16; integers are chosen against the rounded scale. Tokens: one scale per token, dynamic, float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16
_SEARCHED_AT_ONCE = 2**18  # weights, which a processor's own cache holds


def qmax(num_bits: int) -> int:
    """Largest integer of the symmetric grid."""
    return 2 ** (num_bits - 1) - 1


def limits(num_bits: int, full_range: bool = False) -> tuple[int, int]:
    """Smallest and largest integer of a weight's grid."""
    return -qmax(num_bits) - full_range, qmax(num_bits)


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """View of a weight [out, in] as [out, groups, group_size]; one group per row where `group_size` is None."""
    return weight.unflatten(1, (-1, group_size or weight.shape[1]))


def round_scale(scale: Tensor, row_fold: Tensor | None = None) -> Tensor:
    """Scales [out, groups] as they will be read back from disk, in float32.

    Args:
        scale: scales, of either sign.
        row_fold: [out]; the row's factor that is folded into the stored scale (stored = scale * row_fold).
    """
    tiny = torch.finfo(torch.float32).tiny
    if row_fold is None:
        stored = scale.to(SCALE_DTYPE).float()
        return torch.where(stored.abs() > tiny, stored, 1.0)
    stored = (scale * row_fold[:, None]).to(SCALE_DTYPE).float()
    return torch.where(stored.abs() > tiny, stored, 1.0) / row_fold[:, None]


def absmax_scale(weight: Tensor, num_bits: int, group_size: int | None, row_fold: Tensor | None = None) -> Tensor:
    """Scale [out, groups] that maps each group's largest magnitude to qmax; 1 for an all-zero group."""
    return round_scale(grouped(weight.float(), group_size).abs().amax(-1) / qmax(num_bits), row_fold)


def search_scale(
    weight: Tensor,
    num_bits: int,
    group_size: int | None,
    importance: Tensor,
    row_fold: Tensor | None = None,
    full_range: bool = False,
) -> Tensor:
    """Scale [out, groups] with the clipping ratio that minimises sum_i importance_i (w_i - q_i)^2 per group.

    Args:
        weight: [out, in].
        num_bits: of the grid.
        group_size: inputs per scale, None for a whole row.
        importance: [in], non-negative; the diagonal of the Hessian.
        row_fold: see `round_scale`.
        full_range: use the grid's one integer more, with scales of either sign.
    """
    rows = max(_SEARCHED_AT_ONCE // weight.shape[1], 1)
    bands = weight.split(rows)
    folds = [None] * len(bands) if row_fold is None else row_fold.split(rows)
    found = [
        _search_scale(band.float(), num_bits, group_size, importance, fold, full_range)
        for band, fold in zip(bands, folds, strict=True)
    ]
    return torch.cat(found)


def _search_scale(
    weight: Tensor,
    num_bits: int,
    group_size: int | None,
    importance: Tensor,
    row_fold: Tensor | None,
    full_range: bool,
) -> Tensor:
    low, high = limits(num_bits, full_range)
    w = grouped(weight, group_size)
    c = grouped(importance.float()[None], group_size)
    absmax = 2 * w.abs().amax(-1) / (high - low)
    best = round_scale(absmax, row_fold)
    best_error = torch.full_like(best, torch.inf)
    for sign in (1.0, -1.0) if full_range else (1.0,):
        for step in range(15):
            scale = round_scale(absmax * (sign * (1.0 - 0.035 * step)), row_fold)
            q = (w / scale[..., None]).round_().clamp_(low, high).mul_(scale[..., None])
            error = q.sub_(w).square_().mul_(c).sum(-1)
            better = error < best_error
            best = torch.where(better, scale, best)
            best_error = torch.where(better, error, best_error)
    return best


def quantize_weight(weight: Tensor, scale: Tensor, num_bits: int, full_range: bool = False) -> Tensor:
    """Integers, int8 [out, in], of a weight [out, in] on the grid of `scale` [out, groups]; round half to even."""
    w = weight.float().unflatten(1, (scale.shape[1], -1))
    return (w / scale.float()[..., None]).round().clamp(*limits(num_bits, full_range)).flatten(1).to(torch.int8)


def dequantize_weight(q: Tensor, scale: Tensor) -> Tensor:
    """Float32 weight [out, in] of integers [out, in] and scales [out, groups]."""
    return (q.float().unflatten(1, (scale.shape[1], -1)) * scale.float()[..., None]).flatten(1)


def token_scale(x: Tensor, num_bits: int) -> Tensor:
    """Float32 scale [tokens, 1] of tokens [tokens, features]; 1 for an all-zero token. NaN and infinity propagate."""
    scale = x.float().abs().amax(-1, keepdim=True) / qmax(num_bits)
    return torch.where(scale == 0, 1.0, scale)


def quantize_tokens(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Integers, int8 [tokens, features], and float32 scales [tokens, 1] of tokens, one scale per token."""
    limit = qmax(num_bits)
    scale = token_scale(x, num_bits)
    return (x.float() / scale).round_().clamp_(-limit, limit).to(torch.int8), scale


def fake_quantize_tokens(x: Tensor, num_bits: int) -> Tensor:
    """Tokens [tokens, features] rounded to the grid, float32; unchanged at 16 bits."""
    if num_bits >= 16:
        return x.float()
    limit = qmax(num_bits)
    scale = token_scale(x, num_bits)
    return (x.float() / scale).round_().clamp_(-limit, limit).mul_(scale)
