"""The byte budget: never exceeded, optimal on its convex hull, and a forecast of rounding's loss that holds."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masquant.allocation import Option, allocate, candidate_grids, convex_hull, grid_error, options_of
from masquant.models.family import LLAMA_GROUPS
from masquant.plan import GroupPlan, LinearPlan
from masquant.quantization import dequantize_weight, factorize, round_gptq, search_scale
from masquant.recipe import WeightArgs

GRID = WeightArgs(4, "channel")


def option(size: int, loss: float) -> Option:
    return Option(GRID, size, loss)


options = st.lists(st.builds(option, st.integers(1, 50), st.floats(0, 100, allow_nan=False)), min_size=1, max_size=5)


@given(st.lists(options, min_size=1, max_size=4), st.integers(0, 250))
@settings(max_examples=150, deadline=None)
def test_within_the_budget_and_no_worse_than_any_choice_of_fewer_bytes_on_the_hull(
    groups: list[list[Option]], budget: int
) -> None:
    found = allocate(dict(enumerate(groups)), budget)
    cheapest = sum(min(o.bytes for o in convex_hull(g)) for g in groups)
    assert found.bytes <= max(budget, cheapest)
    # A Lagrangian allocation is optimal among all choices that take no more bytes than it, up to one upgrade.
    loss = sum(o.loss for o in found.chosen.values())
    best = min(
        (sum(o.loss for o in choice) for choice in itertools.product(*groups)
         if sum(o.bytes for o in choice) <= found.bytes),
        default=loss,
    )  # fmt: skip
    steps = [a.loss - b.loss for g in groups for a, b in itertools.pairwise(convex_hull(g))]
    assert loss <= best + max(steps, default=0.0) + 1e-9


@given(options)
@settings(max_examples=100, deadline=None)
def test_hull_is_convex_and_falls(found: list[Option]) -> None:
    hull = convex_hull(found)
    slopes = [(a.loss - b.loss) / (b.bytes - a.bytes) for a, b in itertools.pairwise(hull)]
    assert all(s > 0 for s in slopes) and slopes == sorted(slopes, reverse=True)
    assert hull[-1].loss == min(o.loss for o in found)
    assert hull[0].bytes == min(o.bytes for o in found)


def test_bytes_go_where_they_remove_most() -> None:
    groups = {"a": [option(10, 5.0), option(20, 1.0)], "b": [option(10, 50.0), option(20, 10.0)]}
    found = allocate(groups, 30)
    assert found.chosen["b"].bytes == 20 and found.chosen["a"].bytes == 10
    assert found.price == pytest.approx(0.4)
    everything = allocate(groups, 40)
    assert everything.bytes == 40 and everything.price == 0.0


def test_finer_grids_err_less_and_cost_more() -> None:
    weight = torch.randn(64, 128) * torch.rand(64, 1) * (1 + torch.arange(128) / 32)
    plan = GroupPlan(LLAMA_GROUPS[1], (LinearPlan("self_attn.o_proj", 128, 64, False, 4, 128),), ())
    x = torch.randn(500, 128)
    found = options_of(plan, weight, (x.t() @ x).double(), 0.01, 4, True)
    assert [o.grid for o in found] == list(candidate_grids(128, 4, True))
    assert [o.bytes for o in found] == sorted(o.bytes for o in found)
    assert found[0].loss >= found[1].loss > found[2].loss > found[3].loss > 50 * found[4].loss


def test_expected_loss_is_what_gptq_leaves() -> None:
    """sum_j D_j e_j^2 a row forecasts tr(E H E^T) / out of a real rounding within a fifth."""
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(128, 128, generator=g) * torch.logspace(0, -2, 128)
    x = torch.randn(2000, 128, generator=g) @ mix
    hessian = (x.t() @ x).double()
    weight = torch.randn(256, 128, generator=g)
    plan = GroupPlan(LLAMA_GROUPS[1], (LinearPlan("self_attn.o_proj", 128, 256, False, 4, 64),), ())
    expected = {o.grid: o.loss for o in options_of(plan, weight, hessian, 0.01, 4, False)}
    scale = search_scale(weight, 4, 64, torch.ones(128))
    error = (dequantize_weight(round_gptq(weight, scale, factorize(hessian), 4), scale) - weight).double()
    real = float(((error @ hessian) * error).sum()) / len(weight)
    assert expected[WeightArgs(4, "group", 64)] == pytest.approx(real, rel=0.2)
    assert grid_error(weight, WeightArgs(8, "channel")) < grid_error(weight, WeightArgs(4, "group", 32)) / 50
