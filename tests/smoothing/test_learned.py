"""Learned smoothing: the loss by hand, the optimiser's guards, and the straight-through grid."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from masquant.quantization import fake_quantize_tokens
from masquant.recipe import LearnedArgs
from masquant.rotation import Rotation
from masquant.runtime.transforms import attach_input_rotation
from masquant.smoothing.learned import TrialLinear, fake_quantize_through, learn_vectors, modality_loss, swapped


@pytest.mark.parametrize("loss", ["mae", "mse"])
@pytest.mark.parametrize("normalizer", ["token_mean", "modality_mean"])
def test_loss_on_three_tokens_by_hand(loss: str, normalizer: str) -> None:
    """Two text tokens and one audio token of two features, and a padded one that never counts."""
    error = torch.tensor([[[1.0, 3.0], [2.0, -2.0], [0.0, 4.0], [100.0, 100.0]]])
    ids = torch.tensor([[0, 0, 2, 2]], dtype=torch.uint8)
    mask = torch.tensor([[True, True, True, False]])
    args = LearnedArgs(loss=loss, normalizer=normalizer)  # type: ignore[arg-type]
    found = float(modality_loss(error, ids, mask, [1.0, 7.0, 0.5], args))
    text, audio = ([2.0, 2.0], 2.0) if loss == "mae" else ([5.0, 4.0], 8.0)
    wanted = {
        "token_mean": (1.0 * sum(text) + 0.5 * audio) / 3,
        "modality_mean": 1.0 * sum(text) / 2 + 0.5 * audio,
    }
    assert found == pytest.approx(wanted[normalizer])


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_straight_through_grid_is_the_run_time_grid(bits: int) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fake_quantize_through(x, bits, None), fake_quantize_tokens(x, bits))
    assert torch.equal(fake_quantize_through(x, 16, None), x)
    assert not fake_quantize_through(torch.zeros(2, 4), bits, None).any()


def test_gradient_of_the_grid() -> None:
    """Straight through for the rounding; the scale follows the group's largest value."""
    x = torch.tensor([[0.4, -1.0, 0.26, 0.9]], requires_grad=True)
    fake_quantize_through(x, 4, None).sum().backward()
    grid = (x.detach() / (1 / 7)).round()
    residual = (grid - x.detach() * 7).sum()  # d(scale q)/d scale with q rounded, minus the straight-through part
    wanted = torch.ones(1, 4)
    wanted[0, 1] += float(residual) * -1 / 7  # the scale is |x_1| / 7
    torch.testing.assert_close(x.grad, wanted)


class Toy(nn.Module):
    """A block of one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 16)


def learn(initial: Tensor, args: LearnedArgs) -> tuple[Tensor, float, float]:
    torch.manual_seed(0)
    block = Toy()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 40, 32, generator=g)
    ids = torch.randint(0, 3, (2, 40), generator=g).to(torch.uint8)
    x[ids == 1] *= torch.linspace(1, 40, 32)
    target = block.linear(x).detach()
    original = block.linear
    result = learn_vectors(
        block,
        {"g": initial},
        lambda theta, current: {"linear": TrialLinear(original, theta["g"], (4, None, 6), current)},
        lambda _: block.linear(x),
        [target],
        [(ids, torch.ones(2, 40, dtype=torch.bool))],
        [1.0, 1.0, 1.0],
        args,
        seed=0,
    )
    assert block.linear is original
    return result.vectors["g"], result.loss_before, result.loss_after


def test_loss_falls_and_every_scale_moves_and_stays_positive() -> None:
    """A scale of 20 must move as readily as one of 1: theta is a logarithm in float32."""
    initial = torch.ones(3, 32)
    initial[:, ::4] = 20.0
    vectors, before, after = learn(initial, LearnedArgs(steps=60, learning_rate=0.05, patience=60))
    assert after < 0.9 * before
    assert bool((vectors > 0).all())
    assert bool((vectors[:, ::4] != 20.0).any(0).all())


def test_a_worse_result_is_undone() -> None:
    initial = torch.ones(3, 32)
    vectors, before, after = learn(initial, LearnedArgs(steps=2, learning_rate=0.99, patience=1))
    if after == before:
        assert torch.equal(vectors, initial)
    assert after <= before


def test_early_stop() -> None:
    args = LearnedArgs(steps=1000, learning_rate=0.9, patience=2)
    torch.manual_seed(0)
    vectors, before, after = learn(torch.ones(3, 32), args)
    assert after <= before and bool(vectors.isfinite().all())
    assert dataclasses.replace(args, patience=5).patience == 5


@torch.no_grad()
def test_a_swapped_linear_gets_the_rotated_input() -> None:
    block, x, rotation = Toy(), torch.randn(3, 32), Rotation(32, 0)
    wanted = block.linear(x)
    block.linear.weight.copy_(rotation.apply(block.linear.weight))
    attach_input_rotation(block.linear, rotation)
    other = nn.Linear(32, 16)
    other.load_state_dict({"weight": 2 * block.linear.weight, "bias": 2 * block.linear.bias})
    with swapped(block, {"linear": other}):
        torch.testing.assert_close(block.linear(x), 2 * wanted)
    torch.testing.assert_close(block.linear(x), wanted)
