# SPDX-License-Identifier: Apache-2.0
"""Linears outside of the decoder's blocks, with 8-bit rows: those of encoders, and (`head`) the output head.

They see no text tokens among others and have no vectors to choose between, so they need no routing. A checkpoint has
the same tensors of them as of the decoder's linears: `weight_packed`, `weight_scale`, `weight_shape`, `bias`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modality import Modality, ModalityState, ModalityTokens
from ..plan import OuterPlan
from ..quantization import absmax_scale, pack, quantize_weight
from .linear import GroupInput, LinearSpec, MasquantLinear

OUTER_BITS = 8


class AllText(ModalityState):
    """The modality of what a linear outside of the blocks reads: it has no vectors to choose between."""

    def __init__(self) -> None:
        super().__init__(ModalityTokens((Modality.TEXT,), {}))

    def rows_for(self, x: Tensor) -> Tensor | None:
        return None


class OuterLinear(MasquantLinear):
    """A linear with 8-bit rows, one scale each; see `MasquantLinear` for the buffers.

    Args:
        in_features, out_features, has_bias: as in `nn.Linear`.
        dtype: of the bias.
        device: of the buffers.
        activation_bits: 8 (one dynamic scale per row of the input) or 16.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        dtype: torch.dtype,
        device: Any,
        activation_bits: int = 16,
    ) -> None:
        spec = LinearSpec(
            in_features,
            out_features,
            has_bias,
            OUTER_BITS,
            None,
            activation_bits,
            False,
            {},
            "bfloat16",
            None,
            dtype,
        )
        super().__init__(spec, AllText(), GroupInput(1), device)

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Round a float weight [out, in] to nearest."""
        scale = absmax_scale(weight, OUTER_BITS, None)
        self.weight_packed.copy_(pack(quantize_weight(weight, scale, OUTER_BITS), OUTER_BITS))
        self.weight_scale.copy_(scale)
        self.weight_shape.copy_(torch.tensor([self.out_features, self.in_features]))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)


def replace_encoders(
    model: nn.Module, plans: Sequence[OuterPlan], *, dtype: torch.dtype, device: torch.device | str | None
) -> dict[str, nn.Linear]:
    """Replace linears of encoders by empty 8-bit ones; returns the float ones by path."""
    replaced: dict[str, nn.Linear] = {}
    for plan in plans:
        module, linear = model.get_submodule(plan.path), plan.linear
        assert isinstance(module, nn.Linear)
        replaced[plan.path] = module
        shape = linear.in_features, linear.out_features, linear.has_bias
        model.set_submodule(plan.path, OuterLinear(*shape, dtype, device, plan.activation_bits))
    return replaced


def quantize_encoders(model: nn.Module, plans: Sequence[OuterPlan]) -> dict[str, nn.Linear]:
    """Quantize linears of a float model's encoders in place; returns the float ones by path."""
    replaced: dict[str, nn.Linear] = {}
    for plan in plans:
        module = model.get_submodule(plan.path)
        assert isinstance(module, nn.Linear)
        weight = module.weight
        replaced |= replace_encoders(model, [plan], dtype=weight.dtype, device=weight.device)
        outer = model.get_submodule(plan.path)
        assert isinstance(outer, OuterLinear)
        outer.fill(weight, module.bias)
    return replaced


def restore_encoders(model: nn.Module, replaced: Mapping[str, nn.Linear]) -> None:
    """Undo `quantize_encoders`."""
    for path, module in replaced.items():
        model.set_submodule(path, module)


def packed_bytes(modules: Sequence[nn.Module]) -> int:
    """Of linears outside of the blocks as a checkpoint has them, also while kernels hold them in their own layout."""
    return sum(t.numel() * t.element_size() for module in modules for t in module.state_dict().values())


__all__ = ["AllText", "OuterLinear", "packed_bytes", "quantize_encoders", "replace_encoders", "restore_encoders"]
