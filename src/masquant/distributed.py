# SPDX-License-Identifier: Apache-2.0
"""Several processes that share the calibration samples: each runs its own batches, sums go through torch.distributed.

Start them with `torchrun` or `accelerate launch`; one process alone needs nothing. Every process then solves the same
problems and gets the same solutions, so that no weights travel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def join() -> int:
    """Join the other processes that `torchrun` or `accelerate launch` started, if it did; this process's local number,
    which is that of its accelerator."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 writes."""
    return dist.get_rank() if world_size() > 1 else 0


def own_range(count: int) -> range:
    """Which of `count` things are this process's: a contiguous share, so that order is kept over all processes."""
    size, number = world_size(), rank()
    return range(number * count // size, (number + 1) * count // size)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_processes(tensor: Tensor) -> Tensor:
    """The elementwise maximum of all processes' tensors, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def from_first(value: T) -> T:
    """The first process's value."""
    return gather(value)[0]


def gather(value: T) -> list[T]:
    """All processes' values, in the order of their numbers."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


@dataclass(frozen=True)
class SharedBatches:
    """Batches of all processes as one list: numbers `first`.. of `total` are this process's."""

    first: int
    own: int
    total: int

    @classmethod
    def of(cls, own: int) -> SharedBatches:
        """With so many here; every process calls it."""
        counts = gather(own)
        return cls(sum(counts[: rank()]), own, sum(counts))

    def mean(self, loss: Callable[[int], Tensor]) -> float:
        """Mean of a loss, given by position among the own batches, over all batches; the same in every process."""
        with torch.no_grad():
            total = torch.tensor([sum(float(loss(i)) for i in range(self.own))], dtype=torch.float64)
        return float(sum_over_processes(total)) / self.total

    def gradients(
        self, numbers: Sequence[int], loss: Callable[[int], Tensor], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        """Gradients of the mean loss over some batches, given by their numbers in the whole list; each process
        differentiates its own."""
        found = [torch.zeros_like(p) for p in parameters]
        for number in numbers:
            if 0 <= number - self.first < self.own:
                with torch.enable_grad():
                    value = loss(number - self.first)
                for total, part in zip(found, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
                    if part is not None:
                        total += part
        return [sum_over_processes(total) / len(numbers) for total in found]
