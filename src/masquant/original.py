# SPDX-License-Identifier: Apache-2.0
"""A block's groups as the float model has them, before any rotation: what a report compares the result with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .block import stacked_weight
from .calibration.statistics import GroupStatistics
from .modality import Modality
from .models import ModelFamily
from .plan import GroupPlan, group_rotation
from .quantization import absmax_scale, dequantize_weight, fake_quantize_tokens, quantize_weight
from .rotation import Rotation, Rotations


@dataclass(frozen=True)
class OriginalGroup:
    """One group before rotation.

    Attributes:
        weight: [out, in] in the model's dtype.
        rotations: what its input went through, first to last.
        head_size: of the rotation that works within heads, which comes first; None without.
        gain: weight [in] of the norm before the group, folded into the linears; None if it was not.
    """

    weight: Tensor
    rotations: tuple[Rotation, ...] = ()
    head_size: int | None = None
    gain: Tensor | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """What the float model gives the group, of its rotated inputs x [tokens, in]."""
        for rotation in reversed(self.rotations):
            if rotation.size == self.head_size:
                x = rotation.invert(x.unflatten(-1, (-1, rotation.size))).flatten(-2)
            else:
                x = rotation.invert(x)
        return x if self.gain is None else x * self.gain


def original_groups(
    block: nn.Module,
    family: ModelFamily,
    groups: Sequence[GroupPlan],
    rotations: Rotations | None,
    config: Any,
    learned: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, OriginalGroup]:
    """The groups of a block that will be rotated; called before that.

    Args:
        block: in floating point.
        family: the model's.
        groups: of the block.
        rotations: None where nothing is rotated.
        config: the decoder's.
        learned: learned part of the residual stream's rotation [hidden, hidden].
        dtype: of the model, in which the weights are kept.
    """
    found = {}
    for group in groups if rotations is not None else ():
        assert rotations is not None
        residual = rotations.of_residual(config.hidden_size, learned)
        chain: list[Rotation] = []
        gain = head_size = None
        if group.group.fold_kind == "norm" and residual is not None:
            chain.append(residual)
            gain = cast(Tensor, block.get_submodule(group.group.fold_into).weight).detach() + family.norm_offset
        if group.group.fold_kind == "heads":
            head_size = group.in_features // config.num_attention_heads
            heads = rotations.of_heads(head_size) if group.group.rotates_heads else None
            chain += [heads] if heads is not None else []
        online = group_rotation(group, rotations)
        chain += [online] if online is not None else []
        found[group.name] = OriginalGroup(stacked_weight(block, group).to(dtype), tuple(chain), head_size, gain)
    return found


def plain_errors(
    group: GroupPlan,
    original: OriginalGroup,
    statistics: GroupStatistics,
    modalities: Sequence[Modality],
    activation_bits: int,
) -> Mapping[Modality, float]:
    """Relative squared error per modality of rounding the float model's group to nearest, on the tokens that are held.

    The weight has its grid, the activations `activation_bits` per token; nothing is rotated, smoothed or compensated.
    """
    grid, weight = group.linears[0], original.weight.float()
    scale = absmax_scale(weight, grid.num_bits, grid.group_size, torch.ones(len(weight), device=weight.device))
    rounded = dequantize_weight(quantize_weight(weight, scale, grid.num_bits), scale)
    errors = {}
    for modality, held, weights in zip(modalities, statistics.held, statistics.held_weights, strict=True):
        if len(held):
            x = original.inputs(held)
            reference = x @ weight.t()
            difference = fake_quantize_tokens(x, activation_bits) @ rounded.t() - reference
            error, energy = (float(t.square().sum(-1) @ weights) for t in (difference, reference))
            errors[modality] = error / energy if energy > 0 else error
    return errors
