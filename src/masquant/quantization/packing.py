# SPDX-License-Identifier: Apache-2.0
"""Integers on disk: the one place that knows the bit order.

compressed-tensors' `pack-quantized`: int32 words [out, ceil(in / n)], n = 32 / num_bits values a word, the first value
in the lowest bits, each stored with the offset 2^(num_bits - 1). Unused values of the last word are zero bits.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..errors import CheckpointError

PACKED_BITS = (4, 8)


def packed_columns(in_features: int, num_bits: int) -> int:
    """Words per row."""
    return -(-in_features // (32 // num_bits))


def pack(q: Tensor, num_bits: int) -> Tensor:
    """int32 [out, packed_columns] of integers, int8 [out, in].

    Raises:
        ValueError: an integer does not fit, or `num_bits` is neither 4 nor 8.
    """
    if num_bits not in PACKED_BITS:
        raise ValueError(f"can pack {PACKED_BITS} bits, not {num_bits}")
    offset = 2 ** (num_bits - 1)
    if q.numel() and (int(q.min()) < -offset or int(q.max()) >= offset):
        raise ValueError(f"integers {int(q.min())}..{int(q.max())} do not fit in {num_bits} bits")
    per_word = 32 // num_bits
    unsigned = q.to(torch.int64) + offset
    columns = packed_columns(q.shape[1], num_bits)
    padded = torch.nn.functional.pad(unsigned, (0, columns * per_word - q.shape[1]))
    shifts = torch.arange(per_word, device=q.device) * num_bits
    words = (padded.unflatten(1, (columns, per_word)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(packed: Tensor, num_bits: int, in_features: int) -> Tensor:
    """Integers, int8 [out, in_features], of words, int32 [out, packed_columns].

    Raises:
        CheckpointError: the words hold another number of columns.
    """
    if packed.dtype != torch.int32 or packed.shape[1] != packed_columns(in_features, num_bits):
        raise CheckpointError(
            f"packed weight is {packed.dtype} {tuple(packed.shape)}; {in_features} inputs of {num_bits} bits need "
            f"int32 [out, {packed_columns(in_features, num_bits)}]"
        )
    if sys.byteorder != "little":
        packed = packed.view(torch.uint8).unflatten(1, (-1, 4)).flip(-1).flatten(1).view(torch.int32)
    # A little-endian word's bytes are already in the order of its values.
    data = packed.contiguous().view(torch.uint8)
    if num_bits == 8:
        return data[:, :in_features].bitwise_xor(0x80).view(torch.int8)
    both = torch.stack((data & 0xF, data >> 4), dim=-1).flatten(1)
    return both[:, :in_features].to(torch.int8).sub_(8)
