# SPDX-License-Identifier: Apache-2.0
"""Modality-aware smoothing learned on a block's output (arXiv 2603.04800, Eq. 13-14).

    theta* = argmin  sum_m lambda_m || block_q(x; exp(theta)) - y ||  over the tokens of modality m

theta = log(smooth_scale) in float32, one vector per linear group and modality, so that no scale can cross zero or be
too coarse to move (the paper's code learns the scales themselves in bfloat16). In the trial forward every modality has
its own weight Q(W diag(s_m)), as in the paper; rounding passes gradients straight through, its scales are
differentiated. AdamW without decay; the best state seen on all batches is kept, and dropped if it is not better than
where it began. Several processes take the steps that one would take, each with its own batches' part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed import SharedBatches
from ..quantization import qmax
from ..recipe import LearnedArgs


def _round_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def fake_quantize_through(x: Tensor, num_bits: int, group_size: int | None) -> Tensor:
    """Round to the symmetric grid, one scale per group of the last dimension; differentiable in x and its scale."""
    if num_bits >= 16:
        return x
    grouped = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    scale = grouped.abs().amax(-1, keepdim=True) / qmax(num_bits)
    scale = torch.where(scale == 0, 1.0, scale)
    return (_round_through(grouped / scale) * scale).flatten(-2)


class TrialLinear(nn.Module):
    """A linear that quantizes with the vectors under trial."""

    def __init__(
        self,
        linear: nn.Linear,
        theta: Tensor | None,
        grid: tuple[int, int | None, int],
        ids: Callable[[], Tensor],
    ) -> None:
        super().__init__()
        self.weight = linear.weight.detach().float()
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.theta, self.grid, self.ids = theta, grid, ids

    def forward(self, x: Tensor) -> Tensor:
        """y [batch, tokens, out] of x [batch, tokens, in]."""
        bits, group_size, activation_bits = self.grid
        flat, ids = x.float().flatten(0, -2), self.ids().flatten()
        y = flat.new_zeros(len(flat), len(self.weight))
        for m in ids.unique().tolist():
            rows = (ids == m).nonzero().squeeze(1)
            scale = torch.ones(()) if self.theta is None else self.theta[m].exp()
            inputs = fake_quantize_through(flat[rows] / scale, activation_bits, None)
            y = y.index_copy(0, rows, inputs @ fake_quantize_through(self.weight * scale, bits, group_size).t())
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)


def seen_ids(ids: Callable[[], Tensor], rows: Callable[[], Tensor | None]) -> Callable[[], Tensor]:
    """Way to get the modality ids of the tokens that a linear sees, of those of all tokens [batch, tokens]."""

    def own() -> Tensor:
        chosen = rows()
        return ids() if chosen is None else ids().flatten()[chosen]

    return own


def modality_loss(error: Tensor, ids: Tensor, mask: Tensor, weights: Sequence[float], args: LearnedArgs) -> Tensor:
    """Loss of an error [batch, tokens, features].

    `modality_mean`: sum_m w_m mean over m's tokens; `token_mean`: sum of w_m |error| over all tokens / tokens.

    Args:
        error: output minus target.
        ids: uint8 [batch, tokens].
        mask: bool [batch, tokens], False for padding.
        weights: per modality.
        args: loss and normaliser.
    """
    error = error.float()
    per_token = (error.abs() if args.loss == "mae" else error.square()).mean(-1)
    total = per_token.new_zeros(())
    for m, weight in enumerate(weights):
        chosen = (ids == m) & mask
        count = int(chosen.sum()) if args.normalizer == "modality_mean" else int(mask.sum())
        if count and bool(chosen.any()):
            total = total + weight * per_token[chosen].sum() / count
    return total


@dataclass(frozen=True)
class LearnedVectors:
    """Result for one block: vectors per group [modalities, in], and the loss before and after (equal if undone)."""

    vectors: Mapping[str, Tensor]
    loss_before: float
    loss_after: float
    steps: int


@contextmanager
def swapped(block: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The block with others computing what some of its modules do; the modules' hooks, such as the rotation of their
    input, stay in force."""
    originals = [block.get_submodule(name) for name in modules]
    for original, module in zip(originals, modules.values(), strict=True):
        original.forward = module.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for original in originals:
            del original.forward


def learn_vectors(
    block: nn.Module,
    initial: Mapping[str, Tensor],
    trials: Callable[[Mapping[str, Tensor], Callable[[], Tensor]], Mapping[str, nn.Module]],
    run: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float],
    args: LearnedArgs,
    seed: int,
) -> LearnedVectors:
    """Learn a block's vectors.

    Args:
        block: unquantized; as before afterwards.
        initial: per group [modalities, in].
        trials: trial modules by name, for theta per group and a way to get the current modality ids.
        run: the block's output on batch i.
        targets: per batch, the output wanted.
        batches: per batch, modality ids and padding mask.
        weights: lambda per modality.
        args: see `LearnedArgs`.
        seed: of the order of the batches.
    """
    theta = {name: nn.Parameter(vector.float().log()) for name, vector in initial.items()}
    current = [batches[0][0]]
    shared = SharedBatches.of(len(batches))
    generator = torch.Generator().manual_seed(seed)

    def loss_of(i: int) -> Tensor:
        current[0] = batches[i][0]
        output = run(i)
        return modality_loss(output - targets[i].to(output.device), *batches[i], weights, args)

    parameters = list(theta.values())
    with swapped(block, trials(theta, lambda: current[0])):
        first = best = shared.mean(loss_of)
        best_theta = {name: value.detach().clone() for name, value in theta.items()}
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
        step, since_best = 0, 0
        while step < args.steps and since_best < args.patience:
            order = torch.randperm(shared.total, generator=generator).tolist()
            for start in range(0, min(len(order), (args.steps - step) * args.batches_per_step), args.batches_per_step):
                numbers = order[start : start + args.batches_per_step]
                for parameter, gradient in zip(
                    parameters, shared.gradients(numbers, loss_of, parameters), strict=True
                ):
                    parameter.grad = gradient
                optimizer.step()
                step += 1
            value = shared.mean(loss_of)
            since_best += 1
            if value < best:
                best, since_best = value, 0
                best_theta = {name: value.detach().clone() for name, value in theta.items()}
    return LearnedVectors({name: value.exp() for name, value in best_theta.items()}, first, best, step)
