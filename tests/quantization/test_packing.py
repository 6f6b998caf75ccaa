"""Packing: round trips, and the bit order spelled out by an independent oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masquant.errors import CheckpointError
from masquant.quantization import pack, packed_columns, unpack


def packed_by_hand(q: Tensor, bits: int) -> list[list[int]]:
    """compressed-tensors' pack-quantized with Python integers: offset 2^(bits-1), first value lowest."""
    per_word = 32 // bits
    rows = []
    for row in q.tolist():
        row = row + [-(2 ** (bits - 1))] * (-len(row) % per_word)
        words = []
        for start in range(0, len(row), per_word):
            word = sum((v + 2 ** (bits - 1)) << (bits * i) for i, v in enumerate(row[start : start + per_word]))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return rows


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 70), st.sampled_from([4, 8]))
def test_round_trip_and_bit_order(seed: int, rows: int, columns: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    packed = pack(q, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert packed.tolist() == packed_by_hand(q, bits)
    assert torch.equal(unpack(packed, bits, columns), q)


def test_low_nibble_first() -> None:
    assert pack(torch.tensor([[-8, -7, 7]], dtype=torch.int8), 4).tolist() == [[0x0F10]]


@pytest.mark.parametrize("bits", [2, 3, 5, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="can pack"):
        pack(torch.zeros(1, 8, dtype=torch.int8), bits)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit in 4 bits"):
        pack(torch.tensor([[8]], dtype=torch.int8), 4)


def test_wrong_number_of_words_is_refused() -> None:
    with pytest.raises(CheckpointError, match="17 inputs of 4 bits need int32"):
        unpack(torch.zeros(2, 2, dtype=torch.int32), 4, 17)
