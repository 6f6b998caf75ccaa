"""Smoothing: equivalence in exact arithmetic, folding, gauge, and Theorem 1 of arXiv 2603.04800."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masquant.quantization import fake_quantize_tokens
from masquant.smoothing.scales import (
    exact_norm_fold,
    gauge,
    share_across_query_heads,
    smooth_scale,
    spread_scale,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_formula_up_to_one_factor() -> None:
    absmax, weight = torch.tensor([4.0, 1.0, 16.0]), torch.tensor([1.0, 4.0, 1.0])
    s = smooth_scale(absmax, weight, 0.5)
    wanted = (absmax / weight).sqrt()
    torch.testing.assert_close(s / s[0], wanted / wanted[0])
    torch.testing.assert_close(s.log().mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_strength_ends() -> None:
    absmax, weight = torch.tensor([4.0, 1.0]), torch.tensor([0.5, 2.0])
    at_one = smooth_scale(absmax, weight, 1.0)
    torch.testing.assert_close(at_one[0] / at_one[1], torch.tensor(4.0))
    at_zero = smooth_scale(absmax, weight, 0.0)
    torch.testing.assert_close(at_zero[0] / at_zero[1], torch.tensor(4.0))  # 1 / weight


def test_dead_channels_and_absent_modalities_keep_one() -> None:
    absmax = torch.tensor([[2.0, 0.0, 8.0], [0.0, 0.0, 0.0]])
    s = smooth_scale(absmax, torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert s[0, 1] == 1 and s[0, 2] == 1
    assert torch.equal(s[1], torch.ones(3))
    assert bool((s > 0).all()) and bool(s.isfinite().all())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_smoothing_changes_nothing_in_exact_arithmetic(seed: int) -> None:
    x = torch.randn(5, 24, generator=generator(seed), dtype=torch.float64)
    w = torch.randn(7, 24, generator=generator(seed + 1), dtype=torch.float64)
    s = torch.rand(24, generator=generator(seed + 2), dtype=torch.float64) + 0.01
    torch.testing.assert_close((x / s) @ (w * s).t(), x @ w.t(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_fold_is_exact(dtype: torch.dtype) -> None:
    gamma = torch.randn(64, generator=generator()).to(dtype)
    gamma[3] = 0
    wanted = torch.rand(64, generator=generator(1)) * 4 + 0.1
    folded, divisor = exact_norm_fold(gamma, wanted)
    assert folded.dtype == dtype
    torch.testing.assert_close(folded.float() * divisor, gamma.float(), rtol=2e-7, atol=0)
    assert divisor[3] == 1 and folded[3] == 0
    torch.testing.assert_close(divisor[4:], wanted[4:], rtol=2**-7, atol=0)


def test_norm_fold_and_ratio_give_each_modality_its_own_vector() -> None:
    """u = (gamma / s_t) xhat; u / (s_m / s_t) == gamma xhat / s_m, and W diag(s_t) undoes text's vector."""
    g = generator(2)
    gamma, xhat = torch.randn(16, generator=g), torch.randn(5, 16, generator=g)
    s_text, s_audio = torch.rand(16, generator=g) + 0.2, torch.rand(16, generator=g) + 0.2
    w = torch.randn(3, 16, generator=g)
    folded, divisor = exact_norm_fold(gamma, s_text)
    u = folded * xhat
    torch.testing.assert_close(u @ (w * divisor).t(), (gamma * xhat) @ w.t())
    torch.testing.assert_close(u / (s_audio / divisor), gamma * xhat / s_audio)


def test_sharing_across_query_heads_is_constant_per_key_value_head() -> None:
    s = torch.rand(6 * 4, generator=generator(3)) + 0.1
    shared = share_across_query_heads(s, num_heads=6, num_key_value_heads=2).view(2, 3, 4)
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert torch.equal(shared[:, 0], shared[:, 2])
    torch.testing.assert_close(shared[0, 0], s.view(2, 3, 4)[0].log().mean(0).exp())


def test_value_rows_can_take_the_vector_of_o() -> None:
    """Attention weights mix tokens, not channels: dividing v's rows divides o's input, for every query head."""
    g = generator(4)
    heads, kv_heads, dim, tokens = 4, 2, 3, 5
    x, wv = torch.randn(tokens, 8, generator=g), torch.randn(kv_heads * dim, 8, generator=g)
    attention = torch.rand(heads, tokens, tokens, generator=g).softmax(-1)
    s = share_across_query_heads(torch.rand(heads * dim, generator=g) + 0.1, heads, kv_heads)

    def o_input(weight: Tensor) -> Tensor:
        v = (x @ weight.t()).view(tokens, kv_heads, dim).repeat_interleave(heads // kv_heads, 1)
        return torch.einsum("hqk,khd->qhd", attention, v).flatten(1)

    rows = s.view(kv_heads, heads // kv_heads, dim)[:, 0].flatten()
    torch.testing.assert_close(o_input(wv / rows[:, None]), o_input(wv) / s)


def test_spread_ends() -> None:
    shared, own = torch.tensor([1.0, 2.0]), torch.tensor([[4.0, 2.0], [1.0, 8.0]])
    torch.testing.assert_close(spread_scale(shared, own, 0.0), shared.expand(2, 2))
    torch.testing.assert_close(spread_scale(shared, own, 1.0), own)
    torch.testing.assert_close(spread_scale(shared, own, 0.5)[1, 1], torch.tensor(4.0))


def test_gauge_undoes_a_constant_factor() -> None:
    g = generator(5)
    x, w = torch.randn(50, 12, generator=g).double(), torch.randn(4, 12, generator=g).double()
    energy = (x.t() @ x) * (w.t() @ w)
    assert gauge(energy, torch.full((12,), 3.0)) == pytest.approx(1 / 3)
    ratio = torch.rand(12, generator=g).double() + 0.5
    c = 1 / gauge(energy, ratio)

    def loss(c: float) -> float:
        return float((c * (x / ratio) @ w.t() - x @ w.t()).square().sum())

    assert loss(c) <= min(loss(c * 1.01), loss(c * 0.99))


@pytest.mark.parametrize("constant", [True, False])
def test_theorem_1(constant: bool) -> None:
    """Under the dominant modality's vector a token with |x_i| = R_i loses 10 log10(sum a_i^-2 / (d max a_i^-2)) dB."""
    d = 64
    ranges = torch.rand(d, generator=generator(6), dtype=torch.float64) + 0.1
    alpha = torch.full((d,), 7.0, dtype=torch.float64)
    if not constant:
        alpha = 1 + 9 * torch.rand(d, generator=generator(7), dtype=torch.float64)

    def idealised_sqnr(s: Tensor) -> Tensor:
        smoothed = (ranges / s).square()
        return 10 * torch.log10(smoothed.sum() / smoothed.max())

    difference = idealised_sqnr(alpha * ranges) - idealised_sqnr(ranges)
    formula = 10 * torch.log10((alpha**-2).sum() / (d * (alpha**-2).max()))
    assert float(difference) == pytest.approx(float(formula), abs=1e-6)
    assert (abs(float(formula)) < 1e-9) is constant
    assert float(formula) <= 1e-9


def test_own_vector_really_quantizes_better_than_the_loud_ones() -> None:
    """The theorem on real int8 rounding: the quiet modality gains several dB from its own vector."""
    g = generator(8)
    alpha = 1 + 30 * torch.rand(256, generator=g)
    x = torch.randn(200, 256, generator=g)

    def sqnr(s: Tensor) -> float:
        error = fake_quantize_tokens(x / s, 8) * s - x
        return float(10 * torch.log10(x.square().sum() / error.square().sum()))

    assert sqnr(torch.ones(256)) - sqnr(alpha) > 5
