"""GPTQ: against brute force, against nearest, and on degenerate Hessians."""

import itertools

import pytest
import torch
from torch import Tensor

from masquant.quantization import absmax_scale, dequantize_weight, factorize, quantize_weight, round_gptq
from masquant.quantization.rounding import inverse_factor


def data(seed: int, rows: int, columns: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x, (x.t() @ x).double()


def loss(w: Tensor, q: Tensor, scale: Tensor, h: Tensor) -> float:
    d = (dequantize_weight(q, scale) - w).double()
    return float(((d @ h) * d).sum())


@pytest.mark.parametrize("group_size", [None, 16], ids=["channel", "group"])
def test_beats_nearest_on_correlated_inputs(group_size: int | None) -> None:
    w, _, h = data(0, 24, 48, 400)
    scale = absmax_scale(w, 4, group_size)
    gptq, nearest = round_gptq(w, scale, factorize(h), 4), quantize_weight(w, scale, 4)
    assert loss(w, gptq, scale, h) < 0.6 * loss(w, nearest, scale, h)
    assert int(gptq.abs().max()) <= 7


def test_is_nearest_where_inputs_are_uncorrelated() -> None:
    w, _, _ = data(1, 8, 32, 10)
    scale = absmax_scale(w, 4, None)
    h = torch.diag(torch.rand(32, generator=torch.Generator().manual_seed(1)).double() + 0.1)
    assert torch.equal(round_gptq(w, scale, factorize(h), 4), quantize_weight(w, scale, 4))


def test_is_close_to_the_best_of_all_integers() -> None:
    """Three inputs: all neighbours of the float weight are tried by hand."""
    w, _, h = data(2, 6, 3, 50)
    scale = absmax_scale(w, 4, None)
    q = round_gptq(w, scale, factorize(h, 1e-6), 4)
    total_best = 0.0
    for row in range(len(w)):
        centre = (w[row] / scale[row]).floor()
        options = itertools.product(range(-2, 4), repeat=3)
        total_best += min(
            loss(w[row : row + 1], (centre + torch.tensor(o)).clamp(-7, 7)[None], scale[row : row + 1], h)
            for o in options
        )
    assert total_best <= loss(w, q, scale, h) <= 4 * total_best


def test_factor_is_the_cholesky_factor_of_the_damped_inverse() -> None:
    _, _, h = data(3, 1, 20, 100)
    u = inverse_factor(h, 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(20)
    torch.testing.assert_close(u.t() @ u @ damped, torch.eye(20, dtype=torch.float64))
    assert torch.equal(u, u.triu())


@pytest.mark.parametrize("kind", ["zero", "fewer tokens than inputs", "dead input"])
def test_singular_hessians(kind: str) -> None:
    w, x, h = data(4, 8, 32, 5)
    if kind == "zero":
        h = torch.zeros_like(h)
    if kind == "dead input":
        x[:, 3] = 0
        h = (x.t() @ x).double()
    scale = absmax_scale(w, 4, None)
    q = round_gptq(w, scale, factorize(h), 4)
    if kind == "zero":
        assert torch.equal(q, quantize_weight(w, scale, 4))
    if kind == "dead input":
        assert torch.equal(q[:, 3], quantize_weight(w, scale, 4)[:, 3])
    assert loss(w, q, scale, h) <= loss(w, quantize_weight(w, scale, 4), scale, h) + 1e-9


def test_inputs_are_not_modified_and_result_is_reproducible() -> None:
    w, _, h = data(5, 8, 32, 100)
    scale = absmax_scale(w, 4, 16)
    copies = w.clone(), scale.clone(), h.clone()
    first = round_gptq(w, scale, factorize(h), 4)
    assert torch.equal(first, round_gptq(w, scale, factorize(h), 4))
    assert all(torch.equal(a, b) for a, b in zip(copies, (w, scale, h), strict=True))


def test_smoothing_is_a_change_of_coordinates() -> None:
    """Rounding W for inputs divided by s is rounding W diag(s) under the Hessian of the divided inputs."""
    w, x, h = data(6, 16, 32, 200)
    smooth = torch.rand(32, generator=torch.Generator().manual_seed(6)) + 0.3
    scale = absmax_scale(w * smooth, 4, 16)
    divided = ((x / smooth).t() @ (x / smooth)).double()
    ours = round_gptq(w, scale, factorize(h), 4, smooth)
    theirs = round_gptq(w * smooth, scale, factorize(divided), 4)
    # damping and order differ a little between the coordinates; the loss must not
    assert loss(w * smooth, ours, scale, divided) <= 1.1 * loss(w * smooth, theirs, scale, divided)
    assert loss(w * smooth, ours, scale, divided) < 0.7 * loss(
        w * smooth, quantize_weight(w * smooth, scale, 4), scale, divided
    )
