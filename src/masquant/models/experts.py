# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: transformers fuses a block's experts into two 3-D parameters; here each is a module of linears.

    fused     gate_up_proj [experts, 2 x intermediate, hidden],  down_proj [experts, hidden, intermediate]
    linear    <experts>.<number>.{gate_proj, up_proj, down_proj}

`LinearExperts` takes the place of the fused module and is called like it by the block, whose router stays. It knows
which tokens the expert at work sees, so that statistics, gradients and the routing of modalities can follow; for
statistics experts may be shown tokens that were not routed to them, which changes nothing in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..modality import ModalityState

EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """One expert: down_proj(act(gate_proj(x)) * up_proj(x))."""

    def __init__(self, linears: Iterable[nn.Linear], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linears
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] of [tokens, hidden]."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class LinearExperts(nn.ModuleList):
    """The experts of one block.

    Attributes:
        state: the model's modalities, which quantized linears read; None while they are in floating point.
        rows: tokens [n] that the expert at work sees, None outside of a call.
        shown: bool [experts, tokens], tokens that experts see besides those routed to them; for statistics.
        counts: integer [experts, modalities], calibration tokens routed to each; None before they were counted.
        few: bool [experts, modalities], where they are too few to fit an expert to.
    """

    def __init__(self, experts: Iterable[Expert]) -> None:
        super().__init__(experts)
        self.state: ModalityState | None = None
        self.rows: Tensor | None = None
        self.shown: Tensor | None = None
        self.counts: Tensor | None = None
        self.few: Tensor | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the experts' outputs, [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k], the experts of every token.
            top_k_weights: [tokens, k].
        """
        output = torch.zeros_like(hidden_states)
        try:
            for number, expert in enumerate(self):
                routed = top_k_index == number
                seen = routed.any(-1) if self.shown is None else routed.any(-1) | self.shown[number]
                self.rows = seen.nonzero().squeeze(1)
                if not len(self.rows):
                    continue
                with nullcontext() if self.state is None else self.state.selected(self.rows, len(hidden_states)):
                    y = expert(hidden_states[self.rows])
                weights = (top_k_weights * routed).sum(-1)[self.rows, None]
                output = output.index_add(0, self.rows, (y * weights).to(output.dtype))
        finally:
            self.rows = None
        return output


def experts_in(block: nn.Module) -> LinearExperts | None:
    """The linear experts of a block, if it has any."""
    return next((m for m in block.modules() if isinstance(m, LinearExperts)), None)


def token_rows(block: nn.Module, linear: str) -> Callable[[], Tensor | None]:
    """Way to get the tokens that a linear sees while it is called; None for all, as outside of experts."""
    parts = linear.split(".")
    for end in range(len(parts)):
        module = block.get_submodule(".".join(parts[:end]))
        if isinstance(module, LinearExperts):
            experts = module
            return lambda: experts.rows
    return lambda: None


def number_of_experts(block: nn.Module, container: str) -> int:
    """How many experts a block has in its module `container`, fused or linear; 0 if it has no such module."""
    try:
        module = block.get_submodule(container)
    except AttributeError:
        return 0
    return len(module) if isinstance(module, LinearExperts) else len(_fused(block, container).down_proj)


def _fused(block: nn.Module, container: str) -> Any:
    module: Any = block.get_submodule(container)
    known = (
        isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
        and isinstance(getattr(module, "down_proj", None), nn.Parameter)
        and module.gate_up_proj.dim() == 3
    )
    usual = getattr(module, "has_gate", True) and getattr(module, "is_concatenated", True)
    if not known or not usual or any(getattr(module, n, False) for n in ("is_transposed", "has_bias")):
        raise ModelError(
            f"the experts {type(module).__name__} in {container} are not fused as gate_up_proj [experts, 2 x "
            "intermediate, hidden] and down_proj [experts, hidden, intermediate] without bias; this way of fusing "
            "them is not supported"
        )
    return module


def fused_linear(block: nn.Module, container: str, number: int, name: str) -> nn.Linear:
    """A linear of an expert that is still fused, as a view on the fused parameter."""
    module = _fused(block, container)
    half = module.gate_up_proj.shape[1] // 2
    parts = {
        "gate_proj": module.gate_up_proj[number, :half],
        "up_proj": module.gate_up_proj[number, half:],
        "down_proj": module.down_proj[number],
    }
    weight = parts[name].detach()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def linearize_experts(block: nn.Module, container: str) -> None:
    """Replace a block's fused experts by linear ones that share their memory; nothing if it has none.

    Raises:
        ModelError: they are fused in an unknown way.
    """
    count = number_of_experts(block, container)
    if not count or experts_in(block) is not None:
        return
    activation = cast(Callable[[Tensor], Tensor], _fused(block, container).act_fn)
    experts = LinearExperts(
        Expert((fused_linear(block, container, number, name) for name in EXPERT_LINEARS), activation)
        for number in range(count)
    )
    block.set_submodule(container, experts)
    parent: Any = block.get_submodule(container.rpartition(".")[0])
    parent._is_hf_initialized = True  # transformers would look for the fused parameters to give them random values
