# SPDX-License-Identifier: Apache-2.0
"""A recipe's byte budget while a model is being quantized: grids first, then what is left for vectors and patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .allocation import Option, allocate
from .calibration.block_inputs import BlockBatch
from .calibration.gradients import TokenGradients
from .distributed import gather
from .plan import Plan, site_key
from .recipe import BudgetArgs

UNLIMITED = (None, 0)  # terms of a group where the recipe has no budget


def loss_per_error(
    gradients: TokenGradients, batches: Sequence[BlockBatch], block: int, group: str, cap: float
) -> float:
    """Loss per answer token of one squared error at one token of weight 1, summed over the group's outputs."""
    answers = sum(gather(sum(int(b.answers.sum()) for b in batches)))
    _, mean = gradients.capped(block, group, [b.mask for b in batches], cap)
    return mean / (2 * answers)


@dataclass
class Spending:
    """What was bought, and on which terms more can be.

    Attributes:
        plan: with a grid for every group.
        price: loss that a byte must remove.
        left: bytes for vectors and patches.
        notes: what a user should know.
    """

    plan: Plan
    price: float
    left: int
    notes: tuple[str, ...] = ()

    @classmethod
    def on_grids(
        cls, plan: Plan, options: Mapping[str, Sequence[Option]], budget: BudgetArgs, patches: bool
    ) -> Spending:
        """Buy grids.

        Args:
            plan: with the scheme's own grid everywhere, whose bytes the budget is relative to.
            options: per site.
            budget: of the recipe.
            patches: whether to keep a share for them.
        """
        total = math.floor(plan.packed_bytes * (1 + budget.max_bytes))
        reserve = math.floor(total * budget.patches) if patches else 0
        bought = allocate(options, total - reserve)
        blocks = tuple(
            tuple(group.with_grid(bought.chosen[site_key(index, group.name)].grid) for group in groups)
            for index, groups in enumerate(plan.blocks)
        )
        excess = bought.bytes - total
        notes = (f"the cheapest grids take {bought.bytes} bytes, {excess} above the budget",) if excess > 0 else ()
        return cls(replace(plan, blocks=blocks), bought.price, max(-excess, 0), notes)

    def terms(self, spent: int, loss_of_error: float) -> tuple[float, int]:
        """Squared error that a byte must remove, and bytes left after `spent` (see `solver.GroupProblem`)."""
        return (self.price / loss_of_error if loss_of_error > 0 else math.inf), max(self.left - spent, 0)
