# SPDX-License-Identifier: Apache-2.0
"""How much the answers depend on each token's output of each linear group.

Moving a linear's output at token t by d changes the answers' distribution by KL = 1/2 d^T F d, with the Fisher matrix
F = E[g g^T] over the model's own distribution. ||g_t||^2 averaged over random g is its trace: the weight of the token
in a quadratic loss of that linear. g is the gradient of z^T logits at the answer tokens, z ~ N(0, diag(p) - p p^T),
p the model's own probabilities: no label is needed, and one backward pass serves all answer tokens of a sample.

Two passes over the blocks, one block in memory at a time: forward, keeping every block's input; then backwards, each
block run once more with gradients. As many batches go through together as their blocks' inputs may take disk. Keys and
values that a block takes from an earlier one, as some models do, count as given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..blocks import AbstractBlocks
from ..distributed import gather
from ..errors import ModelError
from ..models import LinearGroup, core_of, decoder_of, groups_of, token_rows
from ..progress import AbstractProgress
from .block_inputs import BlockInputs, HiddenStates

STATE_BYTES = 2 * 2**30  # of the blocks' inputs of the batches that go through together, all in memory
SPILLED_STATE_BYTES = 16 * 2**30  # the same where they may go to disk


@dataclass(frozen=True)
class TokenGradients:
    """Squared gradient norms.

    Attributes:
        squared: per block and group name, per batch float32 [batch, tokens]; zero at padding.
    """

    squared: Sequence[Mapping[str, Sequence[Tensor]]]

    def capped(self, block: int, group: str, masks: Sequence[Tensor], quantile: float) -> tuple[list[Tensor], float]:
        """A group's gradients with the largest cut at a quantile, per batch [batch, tokens], and their mean."""
        batches = self.squared[block][group]
        real = torch.cat(gather(torch.cat([g[m] for g, m in zip(batches, masks, strict=True)])))
        largest = real.sort().values[math.ceil(quantile * len(real)) - 1]
        return [g.clamp_max(largest) for g in batches], float(real.clamp_max(largest).mean())

    def weights(self, block: int, masks: Sequence[Tensor], floor: float, cap: float = 1.0) -> dict[str, list[Tensor]]:
        """Per group and batch, the tokens' weights [batch, tokens], of mean 1: floor + (1 - floor) g / mean(g)."""
        result = {}
        for group in self.squared[block]:
            gradients, mean = self.capped(block, group, masks, cap)
            scale = (1 - floor) / mean if mean > 0 else 0.0
            result[group] = [scale * g + (floor if mean > 0 else 1.0) for g in gradients]
        return result

    def modality_means(
        self, block: int, group: str, ids: Sequence[Tensor], masks: Sequence[Tensor], modalities: int
    ) -> list[float]:
        """Mean gradient norm at each modality's tokens (MBQ, arXiv 2412.19509, Eq. 8), the largest scaled to 1."""
        norms = torch.cat(
            gather(torch.cat([g[m].sqrt() for g, m in zip(self.squared[block][group], masks, strict=True)]))
        )
        rows = torch.cat(gather(torch.cat([i[m] for i, m in zip(ids, masks, strict=True)])))
        means = [float(norms[rows == m].mean()) if bool((rows == m).any()) else 0.0 for m in range(modalities)]
        largest = max(means)
        return [max(mean / largest, 1e-3) if largest > 0 else 1.0 for mean in means]


def _float_copy(blocks: AbstractBlocks, index: int, device: torch.device) -> nn.Module:
    return blocks.copy(index).to(device).float().requires_grad_(False)


def _logit_directions(
    model: PreTrainedModel, hidden: Tensor, answers: Tensor, samples: int, generator: torch.Generator
) -> list[Tensor]:
    """Gradients of z^T logits [batch, tokens, features] at the last block's output, for `samples` random z."""
    positions = answers[:, 1:].to(hidden.device)
    norm, head = cast(nn.Module, decoder_of(model).norm), core_of(model).get_output_embeddings()
    leaf = hidden.detach().float()[:, :-1][positions].requires_grad_(True)
    weight = cast(Tensor, head.weight)
    with torch.enable_grad():
        logits = head(norm(leaf).to(weight.dtype)).float()
        probabilities = logits.detach().softmax(-1)
        directions = []
        for k in range(samples):
            noise = torch.randn(probabilities.shape, generator=generator).to(hidden.device) * probabilities.sqrt()
            z = noise - probabilities * noise.sum(-1, keepdim=True)
            (gradient,) = torch.autograd.grad(logits, leaf, z, retain_graph=k + 1 < samples)
            full = torch.zeros(hidden.shape, device=hidden.device)
            full[:, :-1][positions] = gradient
            directions.append(full)
    return directions


def _block_gradients(
    block: nn.Module,
    groups: Sequence[LinearGroup],
    run: Callable[[Tensor], Tensor],
    hidden: Tensor,
    directions: list[Tensor],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Directions at the block's input, and squared gradient norms per group [batch, tokens]."""
    outputs: dict[str, list[tuple[Tensor, Tensor | None]]] = {group.name: [] for group in groups}

    def keep(name: str, rows: Callable[[], Tensor | None]) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _args, output: outputs[name].append((output, rows()))

    handles = [
        block.get_submodule(linear).register_forward_hook(keep(group.name, token_rows(block, linear)))
        for group in groups
        for linear in group.linears
    ]
    leaf = hidden.detach().float().requires_grad_(True)
    try:
        with torch.enable_grad():
            output = run(leaf)
    finally:
        for handle in handles:
            handle.remove()
    flat = [(name, y, rows) for name, ys in outputs.items() for y, rows in ys]
    squared = {group.name: torch.zeros(hidden.shape[:2], device=hidden.device) for group in groups}
    earlier = []
    for k, direction in enumerate(directions):
        found = torch.autograd.grad(
            output, [leaf, *(y for _, y, _ in flat)], direction, retain_graph=k + 1 < len(directions)
        )
        earlier.append(found[0])
        for (name, _, rows), gradient in zip(flat, found[1:], strict=True):
            norms, total = gradient.square().sum(-1).flatten() / len(directions), squared[name].view(-1)
            total.index_add_(0, torch.arange(len(total), device=total.device) if rows is None else rows, norms)
    return earlier, squared


@torch.no_grad()
def token_gradients(
    blocks: AbstractBlocks,
    inputs: BlockInputs,
    *,
    samples: int,
    seed: int,
    device: torch.device,
    progress: AbstractProgress,
) -> TokenGradients:
    """Measure every linear group of every block, on the float model.

    Args:
        blocks: of the model, in floating point.
        inputs: captured; its hidden states are those before the first block, and stay.
        samples: random directions per batch.
        seed: of the directions.
        device: where blocks run.
        progress: receives the blocks.

    Raises:
        ModelError: the gradients are not finite.
    """
    squared: list[dict[str, list[Tensor]]] = [{} for _ in range(len(blocks))]
    together = _batches_together(inputs, len(blocks))
    passes = ((part, step) for part in together for step in (1, -1))
    steps = ((part, step, index) for part, step in passes for index in range(len(blocks))[::step])
    states: list[HiddenStates] = []
    directions: list[list[Tensor]] = []
    total = 2 * len(blocks) * len(together)
    for part, step, index in progress.track(steps, "measuring gradients", total, "block"):
        if step == 1 and index == 0:
            states = [inputs.hidden.empty(len(blocks) + 1)]
            for i in part:
                states[0].append(inputs.hidden[i])
        block = _float_copy(blocks, index, device)
        if step == 1:
            states.append(inputs.hidden.empty(len(blocks) + 1))
            for k, i in enumerate(part):
                states[-1].append(inputs.run(block, index, i, states[-2][k], device))
            continue
        if index == len(blocks) - 1:
            last = states.pop()
            answers = [inputs.batches[i].answers for i in part]
            directions = [
                _logit_directions(blocks.model, last[k].to(device), a, samples, _noise(seed, inputs.first + part[k]))
                for k, a in enumerate(answers)
            ]
        hidden, groups = states.pop(), groups_of(block, blocks.family)
        for k, i in enumerate(part):

            def run(x: Tensor, block: nn.Module = block, index: int = index, i: int = i) -> Tensor:
                return inputs.run(block, index, i, x, device)

            directions[k], found = _block_gradients(block, groups, run, hidden[k].to(device), directions[k])
            for name, values in found.items():
                if not bool(values.isfinite().all()):
                    raise ModelError(f"layers.{index}: the answers' gradient at {name} is not finite")
                squared[index].setdefault(name, []).append(values.cpu())
    return TokenGradients(squared)


def _noise(seed: int, batch: int) -> torch.Generator:
    """Source of a batch's directions, whoever measures it."""
    return torch.Generator().manual_seed(seed + 1_000_003 * batch)


def _batches_together(inputs: BlockInputs, blocks: int) -> list[list[int]]:
    """Numbers of the batches that go through the blocks together."""
    limit = STATE_BYTES if inputs.hidden.memory is None else SPILLED_STATE_BYTES
    parts: list[list[int]] = [[]]
    size = 0
    for i in range(len(inputs.batches)):
        more = inputs.hidden[i].nbytes * (blocks + 1)
        if parts[-1] and size + more > limit:
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += more
    return parts
