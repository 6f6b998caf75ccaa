"""Compensation: the optimum's identities in float64 (arXiv 2603.04800, Theorem 2)."""

import pytest
import torch
from torch import Tensor

from masquant.compensation import (
    Patch,
    leading_spectrum,
    low_rank_patch,
    rank_bytes,
    rank_for_bytes,
    whitened_spectrum,
)

SHAPES = [(12, 20), (30, 20), (20, 20)]


def problem(out_features: int, in_features: int, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(out_features)
    a = torch.randn(tokens, in_features, generator=g, dtype=torch.float64)
    a = a @ torch.randn(in_features, in_features, generator=g, dtype=torch.float64)
    dw = torch.randn(out_features, in_features, generator=g, dtype=torch.float64)
    return dw, a, a.t() @ a


def loss(a: Tensor, dw: Tensor, patch: Tensor) -> float:
    return float((a @ (dw - patch).t()).square().sum())


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_error_is_the_tail_of_the_spectrum(out_features: int, in_features: int) -> None:
    dw, x, c = problem(out_features, in_features)
    spectrum = whitened_spectrum(dw, c)
    previous = float("inf")
    for rank in range(0, min(out_features, in_features) + 1, 3):
        a, b = low_rank_patch(dw, spectrum.vectors[:, :rank])
        error = loss(x, dw, b @ a)
        assert error == pytest.approx(float(spectrum.energies[rank:].sum()), rel=1e-8, abs=1e-6)
        assert error <= previous
        previous = error


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_full_rank_is_exact_for_any_base(out_features: int, in_features: int) -> None:
    dw, x, c = problem(out_features, in_features)
    a, b = low_rank_patch(dw, whitened_spectrum(dw, c).vectors)
    torch.testing.assert_close(x @ (b @ a).t(), x @ dw.t(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_is_no_worse_than_plain_svd_or_random_subspaces(out_features: int, in_features: int) -> None:
    dw, x, c = problem(out_features, in_features)
    rank = 4
    a, b = low_rank_patch(dw, whitened_spectrum(dw, c).vectors[:, :rank])
    ours = loss(x, dw, b @ a)
    u, s, vt = torch.linalg.svd(dw, full_matrices=False)
    assert ours <= loss(x, dw, u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank])
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        basis = torch.linalg.qr(torch.randn(out_features, rank, generator=g, dtype=torch.float64))[0]
        assert ours <= loss(x, dw, basis @ (basis.t() @ dw)) * (1 + 1e-12)


def test_equals_the_papers_form_with_an_inverse() -> None:
    """L1 L2 = T^-1 Trunc_r(T dW^T), C = T^T T, where C is well conditioned."""
    dw, _, c = problem(12, 20)
    a, b = low_rank_patch(dw, whitened_spectrum(dw, c).vectors[:, :5])
    values, vectors = torch.linalg.eigh(c)
    t = (vectors * values.sqrt()).t()
    u, s, vt = torch.linalg.svd(t @ dw.t(), full_matrices=False)
    paper = torch.linalg.solve(t, u[:, :5] @ torch.diag(s[:5]) @ vt[:5])
    torch.testing.assert_close((b @ a).t(), paper, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_fewer_tokens_than_channels(out_features: int, in_features: int) -> None:
    dw, x, c = problem(out_features, in_features, tokens=3)
    spectrum = whitened_spectrum(dw, c)
    a, b = low_rank_patch(dw, spectrum.vectors[:, :3])
    assert bool(a.isfinite().all()) and bool(b.isfinite().all())
    assert loss(x, dw, b @ a) <= 1e-12 * loss(x, dw, torch.zeros_like(dw))


def test_power_iteration_captures_what_the_exact_vectors_do() -> None:
    dw, x, c = problem(100, 120, tokens=500)
    spectrum = whitened_spectrum(dw, c)
    for rank in (1, 4, 12):
        a, b = low_rank_patch(dw, leading_spectrum(dw, c, rank).vectors[:, :rank])
        assert loss(x, dw, b @ a) <= 1.01 * float(spectrum.energies[rank:].sum())
        torch.testing.assert_close(b.t() @ b, torch.eye(rank, dtype=torch.float64))


def test_nothing_to_compensate_gives_a_zero_patch() -> None:
    _, _, c = problem(12, 20)
    zero = torch.zeros(12, 20)
    a, b = low_rank_patch(zero, whitened_spectrum(zero, c).vectors[:, :4])
    assert not (b @ a).any()


def test_bytes() -> None:
    assert 3 * rank_bytes(100, 50, "bfloat16") == 3 * 150 * 2
    assert rank_for_bytes(900, 100, 50, "bfloat16") == 3
    assert rank_for_bytes(899, 100, 50, "bfloat16") == 2
    assert rank_for_bytes(1e9, 100, 50, "int8") == 50


def test_integer_factors_are_within_their_rounding() -> None:
    """Half a step in each factor: |error| <= (|a| + |b|) / 254 of their largest, per rank; zero ranks stay zero."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 40, generator=g, dtype=torch.float64), torch.randn(30, 5, generator=g, dtype=torch.float64)
    a[2], b[:, 2] = 0, 0
    fold = torch.rand(30, generator=g) + 0.5
    patch = Patch.store(a, b * fold[:, None], "int8")
    x = torch.randn(7, 40, generator=g)
    wanted = (x.double() @ a.t() @ b.t()).float()
    assert patch.bytes == 5 * (40 + 30 + 2) == 5 * rank_bytes(40, 30, "int8") and patch.factors == "int8"
    assert float((patch.output(x, fold) - wanted).norm() / wanted.norm()) < 0.01
    exact = Patch.store(a, b * fold[:, None], "bfloat16")
    assert exact.scale is None and exact.bytes == 5 * 2 * (40 + 30)
    assert float((exact.output(x, fold) - wanted).norm() / wanted.norm()) < 0.01
