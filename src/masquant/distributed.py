# SPDX-License-Identifier: Apache-2.0
"""Several processes that share the calibration samples: each runs its own batches, sums go through torch.distributed.

Start them with `torchrun` or `accelerate launch`; one process alone needs nothing. Every process then solves the same
problems and gets the same solutions, so that no weights travel.
"""

from __future__ import annotations

import os
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


def gather(value: T) -> list[T]:
    """All processes' values, in the order of their numbers."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]
