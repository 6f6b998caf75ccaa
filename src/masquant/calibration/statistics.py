# SPDX-License-Identifier: Apache-2.0
"""Per-modality statistics of the inputs of one block's linear groups, collected as a stream.

Products in float32; sums in float64 up to `_DOUBLE_LIMIT` channels, beyond that in float32 to bound memory. Padding
never counts. Samples held back contribute their tokens (a bounded number) but no statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_DOUBLE_LIMIT = 4096
HELD_TOKENS = 512  # per modality and group


@dataclass
class GroupStatistics:
    """Statistics of one group's input.

    Attributes:
        absmax: [modalities, in], float32, over the fitting samples.
        moment: [modalities, in, in], sum of x x^T over the fitting samples.
        counts: [modalities], fitting tokens.
        held: per modality, float32 [tokens, in] of the samples held back.
        held_absmax, held_moment, held_counts: the same statistics of the samples held back.
    """

    absmax: Tensor
    moment: Tensor
    counts: Tensor
    held: list[Tensor]
    held_absmax: Tensor
    held_moment: Tensor
    held_counts: Tensor

    @classmethod
    def empty(cls, modalities: int, features: int, device: torch.device) -> GroupStatistics:
        """Statistics of no token."""
        dtype = torch.float64 if features <= _DOUBLE_LIMIT else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            zeros(modalities, features),
            zeros(modalities, features, features, dtype=dtype),
            zeros(modalities, dtype=torch.int64),
            [zeros(0, features) for _ in range(modalities)],
            zeros(modalities, features),
            zeros(modalities, features, features, dtype=dtype),
            zeros(modalities, dtype=torch.int64),
        )

    def update(self, x: Tensor, ids: Tensor, held: Tensor) -> None:
        """Add tokens x [tokens, in] with modality ids [tokens]; `held` [tokens] marks those held back."""
        x = x.float()
        for m in range(len(self.counts)):
            for is_held in (False, True):
                part = x[(ids == m) & (held == is_held)]
                if not len(part):
                    continue
                absmax, moment, counts = (
                    (self.held_absmax, self.held_moment, self.held_counts)
                    if is_held
                    else (self.absmax, self.moment, self.counts)
                )
                absmax[m] = torch.maximum(absmax[m], part.abs().amax(0))
                moment[m] += (part.t() @ part).to(moment.dtype)
                counts[m] += len(part)
                if is_held:
                    room = HELD_TOKENS - len(self.held[m])
                    self.held[m] = torch.cat((self.held[m], part[: max(room, 0)]))

    def merged(self) -> GroupStatistics:
        """Statistics over all samples, with the same tokens held."""
        zero = torch.zeros_like(self.held_moment[:0])
        return GroupStatistics(
            torch.maximum(self.absmax, self.held_absmax),
            self.moment + self.held_moment,
            self.counts + self.held_counts,
            self.held,
            self.held_absmax,
            zero,
            self.held_counts,
        )


def collect_statistics(
    block: nn.Module,
    leaders: Mapping[str, str],
    batches: Sequence[tuple[Tensor, Tensor, Tensor]],
    forward: Callable[[int], None],
    modalities: int,
) -> dict[str, GroupStatistics]:
    """Statistics of every group's input while `forward(i)` runs the block on batch i.

    Args:
        block: the block, unquantized.
        leaders: per group, a linear's name whose input is the group's.
        batches: per batch, modality ids and padding mask [batch, tokens], and samples held back [batch].
        forward: runs the block.
        modalities: how many the model has.
    """
    statistics: dict[str, GroupStatistics] = {}
    current: list[tuple[Tensor, Tensor, Tensor]] = []

    def hook(group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            ids, mask, held_back = (t.to(x.device) for t in current[0])
            held = held_back[:, None].expand_as(mask)
            if group not in statistics:
                statistics[group] = GroupStatistics.empty(modalities, x.shape[-1], x.device)
            x = x.reshape(*mask.shape, x.shape[-1])
            statistics[group].update(x[mask], ids[mask], held[mask])

        return observe

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(group)) for group, name in leaders.items()]
    try:
        for i, batch in enumerate(batches):
            current[:] = [batch]
            forward(i)
    finally:
        for handle in handles:
            handle.remove()
    return statistics
