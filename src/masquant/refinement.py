# SPDX-License-Identifier: Apache-2.0
"""A solved block refined by gradient on its output: which way each weight rounds, and each scale (its clipping).

    min over v, r   sum_m w_m mean over m's tokens || block_q(x) - block(x) ||^2,
    B = clamp(round(q + v)) * scale * exp(r),   |v| <= 1

by signed gradient descent with a linearly falling step (AutoRound, arXiv 2309.05516); rounding passes gradients
straight through. v starts where the float weight lies beside its integer q, so that the integers start as they were
solved. Vectors and patches stay. The best state on the deciding samples is kept, and dropped if it is not better than
where it began.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .compensation import ALL_TOKENS
from .distributed import SharedBatches
from .modality import Modality
from .models import linear_of, token_rows
from .plan import GroupPlan
from .quantization import limits, round_scale
from .recipe import LearnedArgs, RefinementArgs
from .smoothing.learned import fake_quantize_through, modality_loss, seen_ids, swapped
from .solver import GroupSolution, patch_output

_LOSS = LearnedArgs(loss="mse", normalizer="modality_mean")
_EDGE = 0.499  # how near to the next integer a weight may start


class _Group:
    """The variables of one group."""

    def __init__(self, weight: Tensor, solution: GroupSolution, row_fold: Tensor, bounds: tuple[int, int]) -> None:
        self.solution, self.row_fold, self.bounds = solution, row_fold, bounds
        self.q = solution.q.float()
        self.size = self.q.shape[1] // solution.weight_scale.shape[1]
        step = solution.weight_scale.repeat_interleave(self.size, 1)
        beside = (weight * solution.text_scale / step - self.q).clamp(-_EDGE, _EDGE)
        self.offset = beside.requires_grad_(True)
        self.log_scale = torch.zeros_like(solution.weight_scale).requires_grad_(True)

    def integers(self) -> Tensor:
        """Integers [out, in], as floats; gradients pass to the offsets."""
        moved = self.q + self.offset
        return moved + (moved.round().clamp(*self.bounds) - moved).detach()

    def base(self) -> Tensor:
        """The base weight [out, in]."""
        scale = self.solution.weight_scale * self.log_scale.exp()
        return self.integers() * scale.repeat_interleave(self.size, 1)


class _TrialLinear(nn.Module):
    """One linear of a group with the weights under trial."""

    def __init__(
        self,
        group: _Group,
        rows: slice,
        bias: Tensor | None,
        activation_bits: int,
        modalities: Sequence[Modality],
        ids: Callable[[], Tensor],
    ) -> None:
        super().__init__()
        self.group, self.rows, self.bias_value, self.activation_bits = group, rows, bias, activation_bits
        self.modalities, self.ids = modalities, ids

    def forward(self, x: Tensor) -> Tensor:
        """y [batch, tokens, out] of x [batch, tokens, in]."""
        solution, ids = self.group.solution, self.ids().flatten().long()
        flat = x.float().flatten(0, -2) / solution.text_scale
        if solution.smooth_scale is not None:
            flat = flat / solution.smooth_scale[ids]
        y = fake_quantize_through(flat, self.activation_bits, None) @ self.group.base()[self.rows].t()
        for m, modality in enumerate(self.modalities):
            if any(key in solution.patches for key in (modality.value, ALL_TOKENS)):
                chosen = (ids == m).nonzero().squeeze(1)
                added = patch_output(solution, modality, flat[chosen], self.group.row_fold)
                y = y.index_add(0, chosen, added[:, self.rows])
        if self.bias_value is not None:
            y = y + self.bias_value
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)


@dataclass(frozen=True)
class Refined:
    """Result for one block: its solutions, and the loss on the deciding samples before and after (equal if undone)."""

    solutions: Mapping[str, GroupSolution]
    loss_before: float
    loss_after: float


def refine_block(
    block: nn.Module,
    groups: Sequence[GroupPlan],
    solutions: Mapping[str, GroupSolution],
    row_folds: Mapping[str, Tensor],
    run: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    batches: Sequence[tuple[Tensor, Tensor, Tensor]],
    modalities: Sequence[Modality],
    weights: Sequence[float],
    activation_bits: int,
    full_range: bool,
    args: RefinementArgs,
    seed: int,
) -> Refined:
    """Refine a block's solutions.

    Args:
        block: unquantized, float32; as before afterwards.
        groups: of the block.
        solutions: per group.
        row_folds: per group, the factor [out] that its stored rows get.
        run: the block's output on batch i.
        targets: per batch, the output wanted.
        batches: per batch, modality ids, and masks of the tokens that the variables are fitted to and of those that
            decide, all [batch, tokens].
        modalities: of the model.
        weights: importance of each modality.
        activation_bits: of the inputs.
        full_range: of the weights' grid.
        args: steps and rate.
        seed: of the order of the batches.
    """
    current = [batches[0][0]]
    trials: dict[str, nn.Module] = {}
    variables: dict[str, _Group] = {}
    for group in groups:
        linears = [linear_of(block, p.name) for p in group.linears]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        bounds = limits(group.linears[0].num_bits, full_range)
        trial = variables[group.name] = _Group(weight, solutions[group.name], row_folds[group.name], bounds)
        start = 0
        for plan, linear in zip(group.linears, linears, strict=True):
            rows = slice(start, start + plan.out_features)
            start += plan.out_features
            bias = linear.bias.detach() if plan.has_bias else None
            ids = seen_ids(lambda: current[0], token_rows(block, plan.name))
            trials[plan.name] = _TrialLinear(trial, rows, bias, activation_bits, modalities, ids)
    fitting = [i for i, (_, fit, _) in enumerate(batches) if bool(fit.any())]
    deciding = [i for i, (_, _, decide) in enumerate(batches) if bool(decide.any())]
    shared_fitting, shared_deciding = SharedBatches.of(len(fitting)), SharedBatches.of(len(deciding))

    def loss_of(i: int, *, decide: bool) -> Tensor:
        ids, fit_mask, decide_mask = batches[i]
        current[0] = ids
        error = run(i) - targets[i].to(ids.device)
        return modality_loss(error, ids, decide_mask if decide else fit_mask, weights, _LOSS)

    def judge() -> float:
        return shared_deciding.mean(lambda i: loss_of(deciding[i], decide=True))

    def state() -> list[Tensor]:
        return [t.detach().clone() for g in variables.values() for t in (g.offset, g.log_scale)]

    parameters = [t for g in variables.values() for t in (g.offset, g.log_scale)]
    generator = torch.Generator().manual_seed(seed)
    with swapped(block, trials):
        before = best = judge()
        kept = state()
        order: list[int] = []
        for step in range(args.steps):
            order = order or torch.randperm(shared_fitting.total, generator=generator).tolist()
            gradients = shared_fitting.gradients(
                [order.pop()], lambda i: loss_of(fitting[i], decide=False), parameters
            )
            rate = args.learning_rate * (1 - step / args.steps)
            for position, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                is_scale = position % 2 == 1
                parameter.data.sub_(gradient.sign() * rate * (args.scale_rate if is_scale else 1.0)).clamp_(-1, 1)
            if (step + 1) % max(args.steps // args.evaluations, 1) == 0 and (value := judge()) < best:
                best, kept = value, state()
    refined = dict(solutions)
    for position, (name, variable) in enumerate(variables.items()) if best < before else ():
        variable.offset.data.copy_(kept[2 * position])
        variable.log_scale.data.copy_(kept[2 * position + 1])
        scale = solutions[name].weight_scale * variable.log_scale.detach().exp()
        q = variable.integers().detach().to(torch.int8)
        refined[name] = replace(solutions[name], q=q, weight_scale=round_scale(scale, row_folds[name]))
    return Refined(refined, before, best)
