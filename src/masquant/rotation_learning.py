# SPDX-License-Identifier: Apache-2.0
"""A rotation of the residual stream that is learned (SpinQuant, arXiv 2405.16406), on top of the fixed one.

What a rotation can change about the weights' rounding is their ranges: a group's squared error is proportional to the
square of its largest magnitude. So the orthogonal Q minimises, over a sample of the rows of all linears that read or
write the stream,

    mean over groups of (max |w Q| in the group)^2, each linear in units of its mean square,

by steepest descent along the orthogonal matrices: with the gradient's skew part A = G Q^T - Q G^T every step is the
Cayley transform Q <- (I + s A / 2)^-1 (I - s A / 2) Q, which stays orthogonal. The best Q seen is kept. No data is
needed, and the model's function stays the same whatever Q is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recipe import LearnedRotationArgs


@dataclass(frozen=True)
class LearnedRotation:
    """Q [n, n], float32, and the objective before and after."""

    matrix: Tensor
    before: float
    after: float


def group_ranges(weights: Tensor, group_size: int) -> Tensor:
    """Mean square of the groups' largest magnitudes, relative to the mean square of the weights [rows, inputs]."""
    largest = weights.unflatten(1, (-1, group_size)).abs().amax(-1)
    return largest.square().mean() / weights.square().mean()


def learn_rotation(
    readers: Sequence[Tensor], writers: Sequence[Tensor], group_size: int, args: LearnedRotationArgs
) -> LearnedRotation:
    """Learn Q.

    Args:
        readers: rows [rows, n] of linears whose input is the stream x: they become rows Q.
        writers: columns [n, group] of linears whose output is the stream, one weight group each: Q^T columns.
        group_size: inputs per weight scale of the readers.
        args: steps and rate.
    """
    n = readers[0].shape[1]
    device = readers[0].device
    q = torch.eye(n, device=device)
    identity = torch.eye(n, device=device)
    best, kept, first = float("inf"), q, 0.0
    for step in range(args.steps + 1):
        variable = q.clone().requires_grad_(True)
        with torch.enable_grad():
            parts = [group_ranges(rows @ variable, group_size) for rows in readers]
            parts += [group_ranges(variable.t() @ columns, columns.shape[1]) for columns in writers]
            loss = torch.stack(parts).mean()
            (gradient,) = torch.autograd.grad(loss, variable)
        value = float(loss.detach())
        first = value if step == 0 else first
        if value < best:
            best, kept = value, q
        skew = gradient @ q.t() - q @ gradient.t()
        length = float(torch.linalg.matrix_norm(skew, 2)) if n <= 1024 else float(skew.norm())
        if length == 0:
            break
        half = skew * (args.learning_rate * (1 - step / (args.steps + 1)) / length / 2)
        q = torch.linalg.solve(identity + half, (identity - half) @ q)
    u, _, v = torch.linalg.svd(kept.double())  # rounding errors of the steps
    return LearnedRotation((u @ v).float(), first, best)
