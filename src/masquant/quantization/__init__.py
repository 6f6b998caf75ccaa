# SPDX-License-Identifier: Apache-2.0
"""Integers: grids, rounding, packing. Pure functions on tensors."""

from .grids import (
    SCALE_DTYPE,
    absmax_scale,
    dequantize_weight,
    fake_quantize_tokens,
    limits,
    qmax,
    quantize_tokens,
    quantize_weight,
    round_scale,
    search_scale,
)
from .packing import PACKED_BITS, pack, packed_columns, unpack
from .rounding import GptqFactor, factorize, round_gptq

__all__ = [
    "PACKED_BITS",
    "SCALE_DTYPE",
    "GptqFactor",
    "absmax_scale",
    "dequantize_weight",
    "factorize",
    "fake_quantize_tokens",
    "limits",
    "pack",
    "packed_columns",
    "qmax",
    "quantize_tokens",
    "quantize_weight",
    "round_gptq",
    "round_scale",
    "search_scale",
    "unpack",
]
