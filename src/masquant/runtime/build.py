# SPDX-License-Identifier: Apache-2.0
"""Turn a block's float linears into quantized ones: empty shells to load into, or filled from a solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..compensation import Patch
from ..modality import ModalityState
from ..plan import GroupPlan
from ..rotation import Rotation
from .linear import Compensation, GroupInput, LinearSpec, MasquantLinear


def replace_group(
    block: nn.Module,
    group: GroupPlan,
    *,
    activation_bits: int,
    has_smooth_scale: bool,
    ranks: Mapping[str, int],
    factors: str,
    rotation: Rotation | None,
    state: ModalityState,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> list[MasquantLinear]:
    """Replace the group's linears in `block` by empty quantized ones; returns them, the leader first."""
    shared = GroupInput(len(group.linears))
    modules = []
    for linear in group.linears:
        spec = LinearSpec(
            linear.in_features,
            linear.out_features,
            linear.has_bias,
            linear.num_bits,
            linear.group_size,
            activation_bits,
            has_smooth_scale,
            dict(ranks),
            factors,
            rotation,
            dtype,
        )
        module = MasquantLinear(spec, state, shared, device)
        block.set_submodule(linear.name, module)
        modules.append(module)
    return modules


def fill_group(
    modules: Sequence[MasquantLinear],
    *,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    smooth_scale: Tensor | None,
    patches: Mapping[str, Patch],
) -> None:
    """Copy a group's tensors, rows of all its linears one below the other, into its modules."""
    start = 0
    for module in modules:
        rows = slice(start, start + module.out_features)
        start += module.out_features
        module.weight_packed.copy_(packed[rows])
        module.weight_scale.copy_(weight_scale[rows])
        if module.bias is not None:
            assert bias is not None
            module.bias.copy_(bias[rows])
        if module.smooth_scale is not None:
            assert smooth_scale is not None
            module.smooth_scale.copy_(smooth_scale)
        for key, patch in patches.items():
            factors = cast(Compensation, module.compensation[key])
            factors.b.copy_(patch.b[rows])
            if factors.a is not None:
                factors.a.copy_(patch.a)
            if factors.scale is not None:
                assert patch.scale is not None
                factors.scale.copy_(patch.scale)
