"""Grids: the integers, exact cases and equivariances (a zero row, a constant row, scaling)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masquant.quantization import (
    absmax_scale,
    dequantize_weight,
    fake_quantize_tokens,
    qmax,
    quantize_tokens,
    quantize_weight,
    search_scale,
)


def weight_of(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "limit"), [(4, 7), (6, 31), (8, 127)])
def test_integer_ranges(bits: int, limit: int) -> None:
    assert qmax(bits) == limit
    q, _ = quantize_tokens(weight_of(0, 50, 64) * 100, bits)
    assert q.dtype == torch.int8
    assert int(q.max()) <= limit and int(q.min()) >= -limit
    assert int(q.abs().max()) == limit  # every token reaches the end of its grid
    w = weight_of(1, 16, 64)
    q = quantize_weight(w, absmax_scale(w, min(bits, 8), 32), min(bits, 8))
    assert int(q.abs().max()) == limit


def test_zero_row_gives_zeros() -> None:
    x = torch.zeros(2, 8)
    assert torch.equal(fake_quantize_tokens(x, 8), x)
    assert torch.equal(dequantize_weight(quantize_weight(x, absmax_scale(x, 4, None), 4), absmax_scale(x, 4, None)), x)


def test_constant_row_is_exact() -> None:
    x = torch.full((3, 16), -0.75)
    assert torch.equal(fake_quantize_tokens(x, 6), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_values_are_not_hidden(bad: float) -> None:
    x = torch.ones(2, 4)
    x[0, 1] = bad
    q, scale = quantize_tokens(x, 8)
    assert not (q.float() * scale)[0].isfinite().all()
    assert (q.float() * scale)[1].isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3), st.sampled_from([4, 6, 8]))
def test_tokens_scale_with_their_input(seed: int, factor: float, bits: int) -> None:
    """Q(c x) == c Q(x): rounding moves with the scale. Ties may break the other way by float error, so powers of 2."""
    power = 2.0 ** round(torch.log2(torch.tensor(factor)).item())
    x = weight_of(seed, 4, 32)
    torch.testing.assert_close(fake_quantize_tokens(x * power, bits), power * fake_quantize_tokens(x, bits))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(-20, 20), st.sampled_from([None, 8, 16]))
def test_weights_scale_with_their_rows(seed: int, exponent: int, group_size: int | None) -> None:
    w = weight_of(seed, 5, 32)
    q = quantize_weight(w, absmax_scale(w, 4, group_size), 4)
    scaled = quantize_weight(w * 2.0**exponent, absmax_scale(w * 2.0**exponent, 4, group_size), 4)
    assert torch.equal(q, scaled)


def test_rounding_error_is_at_most_half_a_step() -> None:
    w = weight_of(3, 32, 64)
    scale = absmax_scale(w, 4, 16)
    error = (dequantize_weight(quantize_weight(w, scale, 4), scale) - w).unflatten(1, (4, 16)).abs()
    # bfloat16 scales may fall short of absmax / qmax by 2^-9: the outermost integer is then clipped by that much
    assert bool((error <= scale[..., None] * (0.5 + 7 * 2**-8)).all())


def test_search_is_never_worse_than_absmax_and_helps_outliers() -> None:
    w = weight_of(4, 8, 64)
    w[:, 0] = 12.0
    importance = torch.ones(64)
    importance[0] = 1e-3

    def error(scale: Tensor) -> Tensor:
        return ((dequantize_weight(quantize_weight(w, scale, 4), scale) - w).square() * importance).sum(1)

    searched, plain = error(search_scale(w, 4, None, importance)), error(absmax_scale(w, 4, None))
    assert bool((searched <= plain).all())
    assert float(searched.sum()) < 0.9 * float(plain.sum())


def test_row_fold_makes_the_stored_scale_exact() -> None:
    w = weight_of(5, 6, 32)
    fold = torch.rand(6) + 0.3
    stored = absmax_scale(w, 4, 16, fold) * fold[:, None]
    torch.testing.assert_close(stored.bfloat16().float(), stored, rtol=1e-6, atol=0)
