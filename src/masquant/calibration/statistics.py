# SPDX-License-Identifier: Apache-2.0
"""Per-modality statistics of the inputs of one block's linear groups, collected as a stream.

Products in float32; sums in float64 up to `_DOUBLE_LIMIT` channels, beyond that in float32 to bound memory. Padding
never counts. Samples held back contribute their tokens (a bounded number) but no statistics; where none is held back,
the first tokens are kept all the same, to report errors on.

An expert's statistics are those of the tokens routed to it. Of a modality of which it got too few, it is shown the
tokens of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import gather, max_over_processes, sum_over_processes, world_size
from ..models import LinearExperts, experts_in, linear_of, token_rows

_DOUBLE_LIMIT = 4096
_BAND = 1024
HELD_TOKENS = 512  # per modality and group, to decide by
SEEN_TOKENS = 128  # where none is held back, to report errors on
FEW_TOKENS = 64  # of a modality, below which an expert is fitted to the tokens of all experts


@dataclass(frozen=True)
class Range:
    """Smallest, quartiles and largest of the channels' absmax."""

    min: float
    q25: float
    median: float
    q75: float
    max: float

    @classmethod
    def of(cls, absmax: Tensor) -> Range:
        """Of absmax per channel, [in]."""
        levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=absmax.device)
        return cls(*(float(f"{value:.5g}") for value in torch.quantile(absmax.float(), levels).tolist()))


def misalignment_db(text: Tensor, other: Tensor) -> float:
    """Signal-to-noise that tokens of one modality lose under another's vector, in dB, at most 0.

    arXiv 2603.04800, Theorem 1: 10 log10( sum_i a_i^-2 / (d max_i a_i^-2) ), a_i = R_i^text / R_i^other, over the
    channels that are active in both.

    Args:
        text: absmax of text's channels, [in].
        other: of the other modality's.
    """
    alive = (text > 0) & (other > 0)
    if not bool(alive.any()):
        return 0.0
    inverse = (other[alive] / text[alive]).double().square()
    return float(10 * torch.log10(inverse.sum() / (inverse.numel() * inverse.max())))


def describe_ranges(absmax: Tensor, present: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """What reports say of a group's input: `channels`, each modality's `Range`, and its `misalignment_db` with text.

    Args:
        absmax: [modalities, in], text first.
        present: bool [modalities], those that have tokens.
        names: of the modalities.
    """
    shown = [m for m, found in enumerate(present.tolist()) if found]
    return {
        "channels": {names[m]: asdict(Range.of(absmax[m])) for m in shown},
        "misalignment_db": {names[m]: misalignment_db(absmax[0], absmax[m]) for m in shown if m and 0 in shown},
    }


def moment_dtype(features: int) -> torch.dtype:
    """Of the sums of a group with so many input channels."""
    return torch.float64 if features <= _DOUBLE_LIMIT else torch.float32


def moment_bytes(features: int) -> int:
    """Of one modality's second moments of so many input channels."""
    return features * features * moment_dtype(features).itemsize


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [in, in] += left^T right, in bands, so that no second matrix of its size is needed."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
        return
    for start in range(0, len(total), _BAND):
        rows = slice(start, start + _BAND)
        total[rows] += left[:, rows].t() @ right


@dataclass
class Moments:
    """Statistics over some samples.

    Attributes:
        absmax: [modalities, in], float32.
        magnitude: [modalities, in], sum of |x|, float64.
        counts: [modalities], tokens.
        moment: [modalities, in, in], sum of w x x^T with each token's weight w; None if not collected, or no token
            was seen yet.
        with_moment: whether it is collected.
    """

    absmax: Tensor
    magnitude: Tensor
    counts: Tensor
    moment: Tensor | None
    with_moment: bool = True

    @classmethod
    def empty(cls, modalities: int, features: int, device: torch.device, with_moment: bool) -> Moments:
        """Statistics of no token."""
        return cls(
            torch.zeros(modalities, features, device=device),
            torch.zeros(modalities, features, dtype=torch.float64, device=device),
            torch.zeros(modalities, dtype=torch.int64, device=device),
            None,
            with_moment,
        )

    def update(self, m: int, x: Tensor, weights: Tensor) -> None:
        """Add tokens x, float32 [tokens, in], of modality number m, with weights [tokens]."""
        magnitude = x.abs()
        self.absmax[m] = torch.maximum(self.absmax[m], magnitude.amax(0))
        self.magnitude[m] += magnitude.sum(0, dtype=torch.float64)
        self.counts[m] += len(x)
        if self.with_moment:
            if self.moment is None:
                shape = (*self.absmax.shape, x.shape[1])
                self.moment = torch.zeros(shape, dtype=moment_dtype(x.shape[1]), device=x.device)
            _add_product(self.moment[m], x * weights[:, None], x)

    def __add__(self, other: Moments) -> Moments:
        if self.moment is None or other.moment is None:
            moment = other.moment if self.moment is None else self.moment
        else:
            moment = self.moment + other.moment
        absmax = torch.maximum(self.absmax, other.absmax)
        counts = self.counts + other.counts
        return Moments(absmax, self.magnitude + other.magnitude, counts, moment, self.with_moment)

    def reduce(self) -> None:
        """Make it that of all processes' samples."""
        if any(gather(self.moment is not None)):
            if self.moment is None:
                shape = (*self.absmax.shape, self.absmax.shape[1])
                self.moment = torch.zeros(shape, dtype=moment_dtype(shape[1]), device=self.absmax.device)
            sum_over_processes(self.moment)
        max_over_processes(self.absmax)
        sum_over_processes(self.magnitude)
        sum_over_processes(self.counts)

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean of |x| over all tokens, float32 [in]."""
        return (self.magnitude.sum(0) / self.counts.sum().clamp_min(1)).float()


@dataclass(frozen=True)
class InputRanges:
    """Absmax of a group's input over all samples.

    Attributes:
        absmax: [modalities, in].
        original: the same in the float model, before any rotation.
        present: bool [modalities], those that have tokens.
    """

    absmax: Tensor
    original: Tensor
    present: Tensor


@dataclass
class GroupStatistics:
    """Statistics of one group's input.

    Attributes:
        fitting: over the samples that candidates are solved on.
        deciding: over the samples held back.
        held: per modality, tokens of the samples held back (the first ones if no sample is), float32 [tokens, in].
        held_weights: their weights [tokens].
        original: absmax of the float model's own input, before any rotation, [modalities, in]; None if the same.
    """

    fitting: Moments
    deciding: Moments
    held: list[Tensor]
    held_weights: list[Tensor]
    original: Tensor | None = None

    @classmethod
    def empty(cls, modalities: int, features: int, device: torch.device, with_moment: bool = True) -> GroupStatistics:
        """Statistics of no token."""
        return cls(
            Moments.empty(modalities, features, device, with_moment),
            Moments.empty(modalities, features, device, with_moment),
            [torch.zeros(0, features, device=device) for _ in range(modalities)],
            [torch.zeros(0, device=device) for _ in range(modalities)],
        )

    def update(
        self, x: Tensor, ids: Tensor, held: Tensor, weights: Tensor | None = None, *, keep_seen: bool = False
    ) -> None:
        """Add tokens x [tokens, in] with modality ids [tokens]; `held` [tokens] marks those held back.

        `weights` [tokens] says how much each counts; default ones. `keep_seen`: keep tokens that are not held back.
        """
        x = x.float()
        weights = x.new_ones(len(x)) if weights is None else weights
        for m in range(len(self.held)):
            own = ids == m
            fitting, deciding = own & ~held, own & held
            if bool(fitting.any()):
                self.fitting.update(m, x[fitting], weights[fitting])
            if bool(deciding.any()):
                self.deciding.update(m, x[deciding], weights[deciding])
            kept, room = (own, SEEN_TOKENS) if keep_seen else (deciding, HELD_TOKENS)
            room -= len(self.held[m])
            if room > 0 and bool(kept.any()):
                self.held[m] = torch.cat((self.held[m], x[kept][:room]))
                self.held_weights[m] = torch.cat((self.held_weights[m], weights[kept][:room]))

    def update_original(self, x: Tensor, ids: Tensor) -> None:
        """Add the same tokens as the float model has them, x [tokens, in] with modality ids [tokens]."""
        if self.original is None:
            self.original = torch.zeros_like(self.fitting.absmax)
        for m in range(len(self.held)):
            own = ids == m
            if bool(own.any()):
                self.original[m] = torch.maximum(self.original[m], x[own].abs().amax(0))

    def reduce(self) -> None:
        """Make it that of all processes' samples."""
        self.fitting.reduce()
        self.deciding.reduce()
        if self.original is not None:
            max_over_processes(self.original)
        most = HELD_TOKENS if bool(self.deciding.counts.any()) else SEEN_TOKENS
        for m in range(len(self.held)):
            device = self.held[m].device
            self.held[m] = torch.cat([x.to(device) for x in gather(self.held[m].cpu())])[:most]
            self.held_weights[m] = torch.cat([w.to(device) for w in gather(self.held_weights[m].cpu())])[:most]

    def merged(self) -> Moments:
        """Statistics over all samples."""
        return self.fitting + self.deciding

    def ranges(self) -> InputRanges:
        """What reports need, without the moments."""
        absmax = torch.maximum(self.fitting.absmax, self.deciding.absmax)
        present = (self.fitting.counts + self.deciding.counts) > 0
        return InputRanges(absmax, absmax if self.original is None else self.original, present)


def collect_statistics(
    block: nn.Module,
    leaders: Mapping[str, str],
    batches: Sequence[tuple[Tensor, Tensor, Tensor]],
    forward: Callable[[int], None],
    modalities: int,
    with_moment: bool = True,
    weights: Mapping[str, Sequence[Tensor]] | None = None,
    originals: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, GroupStatistics]:
    """Statistics of every group's input while `forward(i)` runs the block on batch i.

    Args:
        block: the block, unquantized.
        leaders: per group, a linear's name whose input is the group's.
        batches: per batch, modality ids and padding mask [batch, tokens], and samples held back [batch].
        forward: runs the block.
        modalities: how many the model has.
        with_moment: collect second moments too.
        weights: per group and batch, the tokens' weights [batch, tokens]; default ones.
        originals: per rotated group, the float model's input [tokens, in] of the rotated one.
    """
    statistics: dict[str, GroupStatistics] = {}
    current = [0]
    keep_seen = not any(gather(any(bool(held.any()) for _, _, held in batches)))
    experts = experts_in(block)
    if experts is not None and experts.counts is None:
        count_routed(experts, batches, forward, modalities)

    def hook(group: str, rows: Callable[[], Tensor | None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, seen = args[0].detach().flatten(0, -2), rows()
            ids, mask, held_back = (t.to(x.device) for t in batches[current[0]])
            parts = [ids.flatten(), held_back[:, None].expand_as(mask).flatten()]
            parts += [weights[group][current[0]].to(x.device).flatten()] if weights else []
            mask = mask.flatten()
            if seen is not None:
                mask, parts = mask[seen], [part[seen] for part in parts]
            parts = [part[mask] for part in parts]
            statistics[group].update(x[mask], *parts, keep_seen=keep_seen)
            if originals and group in originals:
                statistics[group].update_original(originals[group](x[mask].float()), parts[0])

        return observe

    handles = []
    for group, name in leaders.items():  # also for an expert that sees no token, here or in another process
        linear = linear_of(block, name)
        statistics[group] = GroupStatistics.empty(modalities, linear.in_features, linear.weight.device, with_moment)
        handles.append(linear.register_forward_pre_hook(hook(group, token_rows(block, name))))
    try:
        for i in range(len(batches)):
            current[0] = i
            if experts is not None and experts.few is not None:
                ids, mask = (t.flatten().to(experts.few.device) for t in batches[i][:2])
                experts.shown = experts.few[:, ids.long()] & mask
            forward(i)
    finally:
        for handle in handles:
            handle.remove()
        if experts is not None:
            experts.shown = None
    for found in statistics.values() if world_size() > 1 else ():
        found.reduce()
    return statistics


def count_routed(
    experts: LinearExperts,
    batches: Sequence[tuple[Tensor, Tensor, Tensor]],
    forward: Callable[[int], None],
    modalities: int,
) -> None:
    """Fill in the experts' `counts`, and `few`, for which tokens of samples held back do not count.

    Arguments as in `collect_statistics`.
    """
    found: list[Tensor] = []
    current = [0]

    def count(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        chosen = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        ids, mask, held_back = (t.to(chosen.device) for t in batches[current[0]])
        fitting = (mask & ~held_back[:, None]).flatten()
        routed = torch.stack([(chosen == number).any(-1) & mask.flatten() for number in range(len(experts))])
        own = torch.stack([ids.flatten() == m for m in range(modalities)])
        found.append(torch.stack([(r[:, None] & own[None]).sum(-1) for r in (routed, routed & fitting)]))

    handle = experts.register_forward_pre_hook(count, with_kwargs=True)
    try:
        for i in range(len(batches)):
            current[0] = i
            forward(i)
    finally:
        handle.remove()
    experts.counts, fitting = sum_over_processes(torch.stack(found).sum(0))
    experts.few = fitting < FEW_TOKENS
