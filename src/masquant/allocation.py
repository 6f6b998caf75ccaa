# SPDX-License-Identifier: Apache-2.0
"""Where the bytes go: a grid for every linear group, so that the loss expected within a byte budget is least.

Rounding a group's weight with error compensation (GPTQ) raises the answers' loss by about

    1/2 sum_j D_j e_j^2,    H = L D L^T = sum_t g_t x_t x_t^T

per output row, with e_j the rounding error of column j and g_t the squared gradient at token t, spread evenly over
the outputs (`calibration.gradients`): columns whose error later columns can make up for have a small D_j. A grid's
squared error is measured on a sample of the rows. All on the float model, one block in memory at a time.

The budget is spent greedily: every group starts with its cheapest grid, and the upgrade that removes most loss per
byte comes first, along each group's lower convex hull.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .plan import GroupPlan
from .quantization import dequantize_weight, quantize_weight, search_scale
from .quantization.rounding import inverse_factor
from .recipe import AUTO_GROUP_SIZES, WeightArgs

_ROWS = 128  # sampled to measure a grid's error

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Option:
    """One grid for a group: its bytes, and the loss expected."""

    grid: WeightArgs
    bytes: int
    loss: float


@dataclass(frozen=True)
class Allocation(Generic[Key]):
    """The options chosen, and the loss per byte of the best upgrade that did not fit (0 if all did)."""

    chosen: Mapping[Key, Option]
    price: float

    @property
    def bytes(self) -> int:
        """Of all options chosen."""
        return sum(option.bytes for option in self.chosen.values())


def candidate_grids(in_features: int, num_bits: int, full_range: bool) -> tuple[WeightArgs, ...]:
    """Grids tried for a group: all group sizes that divide, one scale per row, and twice the bits."""
    sizes = [size for size in AUTO_GROUP_SIZES if in_features % size == 0]
    grids = [WeightArgs(num_bits, "channel", None, full_range)]
    grids += [WeightArgs(num_bits, "group", size, full_range) for size in sizes]
    if num_bits == 4:
        grids.append(WeightArgs(8, "channel"))
    return tuple(grids)


def grid_error(weight: Tensor, grid: WeightArgs) -> float:
    """Mean squared rounding error of a weight [out, in] on a grid with searched scales."""
    rows = weight[:: max(len(weight) // _ROWS, 1)]
    size = grid.group_size_for(weight.shape[1])
    ones = torch.ones(weight.shape[1], device=weight.device)
    scale = search_scale(rows, grid.num_bits, size, ones, None, grid.full_range)
    q = quantize_weight(rows, scale, grid.num_bits, grid.full_range)
    return float((dequantize_weight(q, scale) - rows).square().mean())


def options_of(
    group: GroupPlan, weight: Tensor, hessian: Tensor, damping: float, num_bits: int, full_range: bool
) -> tuple[Option, ...]:
    """Every candidate grid of a group with its bytes and expected loss.

    Args:
        group: plan of the group.
        weight: float32 [out, in].
        hessian: H / 2 of the module's text, per answer token [in, in].
        damping: of the rounding.
        num_bits: of the scheme.
        full_range: of its grid.
    """
    conditional = float(inverse_factor(hessian, damping).diagonal().pow(-2).sum())
    return tuple(
        Option(grid, group.with_grid(grid).packed_bytes, conditional * grid_error(weight, grid))
        for grid in candidate_grids(group.in_features, num_bits, full_range)
    )


def convex_hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over bytes, cheapest first; losses fall strictly."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) >= 2 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        if hull and hull[-1].bytes == option.bytes:
            hull.pop()
        hull.append(option)
    return hull


def _gain(cheap: Option, dear: Option) -> float:
    return (cheap.loss - dear.loss) / max(dear.bytes - cheap.bytes, 1)


def allocate(options: Mapping[Key, Sequence[Option]], budget: int) -> Allocation[Key]:
    """Choose one option per key within `budget` bytes, the most loss removed per byte first.

    The cheapest options are chosen even where they exceed the budget.
    """
    hulls = {key: convex_hull(found) for key, found in options.items()}
    chosen = {key: hull[0] for key, hull in hulls.items()}
    position = dict.fromkeys(hulls, 0)
    left = budget - sum(option.bytes for option in chosen.values())
    queue = [(-_gain(hull[0], hull[1]), n, key) for n, (key, hull) in enumerate(hulls.items()) if len(hull) > 1]
    heapq.heapify(queue)
    price = 0.0
    while queue:
        gain, n, key = heapq.heappop(queue)
        hull, at = hulls[key], position[key]
        cost = hull[at + 1].bytes - hull[at].bytes
        if cost > left:
            price = max(price, -gain)
            continue
        left -= cost
        position[key], chosen[key] = at + 1, hull[at + 1]
        if at + 2 < len(hull):
            heapq.heappush(queue, (-_gain(hull[at + 1], hull[at + 2]), n, key))
    return Allocation(chosen, price)
