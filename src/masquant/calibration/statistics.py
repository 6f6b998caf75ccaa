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
class Moments:
    """Statistics over some samples.

    Attributes:
        absmax: [modalities, in], float32.
        counts: [modalities], tokens.
        moment: [modalities, in, in], sum of x x^T, or None.
    """

    absmax: Tensor
    counts: Tensor
    moment: Tensor | None

    @classmethod
    def empty(cls, modalities: int, features: int, device: torch.device, with_moment: bool) -> Moments:
        """Statistics of no token."""
        dtype = torch.float64 if features <= _DOUBLE_LIMIT else torch.float32
        moment = torch.zeros(modalities, features, features, dtype=dtype, device=device) if with_moment else None
        return cls(
            torch.zeros(modalities, features, device=device),
            torch.zeros(modalities, dtype=torch.int64, device=device),
            moment,
        )

    def update(self, m: int, x: Tensor) -> None:
        """Add tokens x, float32 [tokens, in], of modality number m."""
        self.absmax[m] = torch.maximum(self.absmax[m], x.abs().amax(0))
        self.counts[m] += len(x)
        if self.moment is not None:
            self.moment[m] += (x.t() @ x).to(self.moment.dtype)

    def __add__(self, other: Moments) -> Moments:
        moment = None if self.moment is None or other.moment is None else self.moment + other.moment
        return Moments(torch.maximum(self.absmax, other.absmax), self.counts + other.counts, moment)


@dataclass
class GroupStatistics:
    """Statistics of one group's input.

    Attributes:
        fitting: over the samples that candidates are solved on.
        deciding: over the samples held back.
        held: per modality, tokens of the samples held back, float32 [tokens, in].
    """

    fitting: Moments
    deciding: Moments
    held: list[Tensor]

    @classmethod
    def empty(cls, modalities: int, features: int, device: torch.device, with_moment: bool = True) -> GroupStatistics:
        """Statistics of no token."""
        return cls(
            Moments.empty(modalities, features, device, with_moment),
            Moments.empty(modalities, features, device, with_moment),
            [torch.zeros(0, features, device=device) for _ in range(modalities)],
        )

    def update(self, x: Tensor, ids: Tensor, held: Tensor) -> None:
        """Add tokens x [tokens, in] with modality ids [tokens]; `held` [tokens] marks those held back."""
        x = x.float()
        for m in range(len(self.held)):
            own = ids == m
            fitting, deciding = x[own & ~held], x[own & held]
            if len(fitting):
                self.fitting.update(m, fitting)
            if len(deciding):
                self.deciding.update(m, deciding)
                room = max(HELD_TOKENS - len(self.held[m]), 0)
                self.held[m] = torch.cat((self.held[m], deciding[:room]))

    def merged(self) -> Moments:
        """Statistics over all samples."""
        return self.fitting + self.deciding


def collect_statistics(
    block: nn.Module,
    leaders: Mapping[str, str],
    batches: Sequence[tuple[Tensor, Tensor, Tensor]],
    forward: Callable[[int], None],
    modalities: int,
    with_moment: bool = True,
) -> dict[str, GroupStatistics]:
    """Statistics of every group's input while `forward(i)` runs the block on batch i.

    Args:
        block: the block, unquantized.
        leaders: per group, a linear's name whose input is the group's.
        batches: per batch, modality ids and padding mask [batch, tokens], and samples held back [batch].
        forward: runs the block.
        modalities: how many the model has.
        with_moment: collect second moments too.
    """
    statistics: dict[str, GroupStatistics] = {}
    current: list[tuple[Tensor, Tensor, Tensor]] = []

    def hook(group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            ids, mask, held_back = (t.to(x.device) for t in current[0])
            held = held_back[:, None].expand_as(mask)
            if group not in statistics:
                statistics[group] = GroupStatistics.empty(modalities, x.shape[-1], x.device, with_moment)
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
