# SPDX-License-Identifier: Apache-2.0
"""The low-bit linear as torch ops. These PyTorch bodies are the specification; faster kernels must agree with them.

    x_s = x / smooth_scale[row]                      row = the token's modality
    q, scale = round x_s to int8 per token           (16-bit activations: q = x_s, scale = 1)
    y = scale * sum_g weight_scale[:, g] * (q_g . w_g)  + bias  + (x_s a_m^T) b_m^T  for tokens of modality m only

Products of integers are exact; scales and the sums over groups are float32. Three ops, because the first two are
shared by all linears of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantization import quantize_tokens, unpack

_FEW_TOKENS = 64  # up to here grouped integer products beat one float32 product


def _smoothed(x: Tensor, rows: Tensor | None, smooth_scale: Tensor | None) -> Tensor:
    """x [tokens, in] divided by each token's vector, float32. Without rows all tokens are text: row 0."""
    x = x.float()
    if smooth_scale is None:
        return x
    if rows is None:
        return x / smooth_scale[0].float()
    return x / smooth_scale.float()[rows.long()]


@torch.library.custom_op("masquant::quantize_input", mutates_args=())
def quantize_input(
    x: Tensor, rows: Tensor | None, smooth_scale: Tensor | None, num_bits: int
) -> tuple[Tensor, Tensor]:
    """Smoothed and quantized input.

    Args:
        x: [tokens, in].
        rows: uint8 [tokens], rows of `smooth_scale`; None if all tokens are text.
        smooth_scale: [modalities, in], or None for no smoothing.
        num_bits: 6 or 8; 16 keeps floating point.

    Returns:
        int8 [tokens, in] and float32 scales [tokens, 1]; float32 [tokens, in] and ones at 16 bits.
    """
    smoothed = _smoothed(x, rows, smooth_scale)
    if num_bits >= 16:
        if smoothed.data_ptr() == x.data_ptr():
            smoothed = smoothed.clone()
        return smoothed, torch.ones(len(x), 1, dtype=torch.float32, device=x.device)
    return quantize_tokens(smoothed, num_bits)


@quantize_input.register_fake
def _(x: Tensor, rows: Tensor | None, smooth_scale: Tensor | None, num_bits: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if num_bits >= 16 else torch.int8
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("masquant::project_input", mutates_args=())
def project_input(x: Tensor, rows: Tensor | None, smooth_scale: Tensor | None, a: Tensor, row: int) -> Tensor:
    """First half of a patch: (x / smooth_scale[row]) a^T, float32 [tokens, rank]; zero for other modalities' tokens.

    The patch reads the input before it is quantized (arXiv 2603.04800, Eq. 29).

    Args:
        x: [tokens, in].
        rows: uint8 [tokens]; None if all tokens are text.
        smooth_scale: [modalities, in], or None.
        a: [rank, in].
        row: the patch's modality; -1 for every token.
    """
    if row < 0:
        return _smoothed(x, rows, smooth_scale) @ a.float().t()
    assert rows is not None
    projected = torch.zeros(len(x), len(a), dtype=torch.float32, device=x.device)
    chosen = (rows == row).nonzero().squeeze(1)
    if len(chosen):
        part = x[chosen].float()
        if smooth_scale is not None:
            part = part / smooth_scale[row].float()
        projected[chosen] = part @ a.float().t()
    return projected


@project_input.register_fake
def _(x: Tensor, rows: Tensor | None, smooth_scale: Tensor | None, a: Tensor, row: int) -> Tensor:
    return x.new_empty((x.shape[0], a.shape[0]), dtype=torch.float32)


def _integer_product(q: Tensor, w: Tensor) -> Tensor:
    """Exact q w^T of int8 [tokens, in] and int8 [out, in], as float32 or int32."""
    if q.shape[1] == 1:
        return q.int() * w.t().int()  # where _int_mm reads beyond the single column
    if q.device.type == "cpu":
        return torch._int_mm(q, w.t())
    # |sum| <= 127 * 127 * 1024 < 2^24: exact in float32 (and in TF32, whose inputs hold 8-bit integers).
    total = torch.zeros(len(q), len(w), dtype=torch.float64, device=q.device)
    for start in range(0, q.shape[1], 1024):
        total += q[:, start : start + 1024].float() @ w[:, start : start + 1024].float().t()
    return total


def _scaled_product(q: Tensor, scale: Tensor, w: Tensor, weight_scale: Tensor) -> Tensor:
    """Float32 [tokens, out]: see the module's formula."""
    groups = weight_scale.shape[1]
    if groups == 1 and not q.is_floating_point():
        return _integer_product(q, w).float() * weight_scale[:, 0] * scale
    if len(q) > _FEW_TOKENS or q.is_floating_point():
        # An 8-bit integer times a 4- or 8-bit one times a bfloat16 scale fits in float32's 24 bits: the products are
        # exact and only their sums are rounded, as below.
        weight = (w.float().unflatten(1, (groups, -1)) * weight_scale[..., None]).flatten(1)
        return (q.float() @ weight.t()).mul_(scale)
    y = torch.zeros(len(q), len(w), dtype=torch.float32, device=q.device)
    size = q.shape[1] // groups
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        y.addcmul_(_integer_product(q[:, columns], w[:, columns]).float(), weight_scale[:, g])
    return y.mul_(scale)


@torch.library.custom_op("masquant::linear", mutates_args=())
def linear(
    q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    projected: Sequence[Tensor],
    b: Sequence[Tensor],
    num_bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Low-bit linear of a quantized input.

    Args:
        q: int8 [tokens, in] from `quantize_input`, or float32 for 16-bit activations.
        scale: float32 [tokens, 1].
        weight_packed: int32 [out, words].
        weight_scale: [out, groups].
        bias: [out] or None.
        projected: per patch, float32 [tokens, rank] from `project_input`.
        b: per patch, [out, rank].
        num_bits: of the weight.
        dtype: of the result.

    Returns:
        [tokens, out].
    """
    w = unpack(weight_packed, num_bits, q.shape[1])
    y = _scaled_product(q, scale, w, weight_scale.float())
    if bias is not None:
        y += bias.float()
    for part, factor in zip(projected, b, strict=True):
        y.addmm_(part, factor.float().t())
    return y.to(dtype)


@linear.register_fake
def _(
    q: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    projected: Sequence[Tensor],
    b: Sequence[Tensor],
    num_bits: int,
    dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((q.shape[0], weight_packed.shape[0]), dtype=dtype)
