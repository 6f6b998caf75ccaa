# SPDX-License-Identifier: Apache-2.0
"""Looking at models: what scheme they have, and how the modalities' activations differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .api import load_processor
from .calibration.dataset import load_samples
from .calibration.statistics import describe_ranges
from .integrations.loading import load_streamed
from .integrations.transformers import quantized_linears
from .modality import ModalityState
from .models import modality_tokens_of
from .pipeline import Calibration
from .plan import make_plan
from .progress import AbstractProgress
from .recipe import Recipe
from .run import Run


def scheme_of(model: nn.Module) -> str:
    """Scheme of a loaded model, by the lowest bits where they differ; "float" if it is not quantized."""
    specs = [module.spec for module in quantized_linears(model).values()]
    return f"W{min(s.num_bits for s in specs)}A{specs[0].activation_bits}" if specs else "float"


@torch.no_grad()
def activation_ranges(
    model: str | Path, calibration: Path, *, limit: int | None, batch_size: int, progress: AbstractProgress
) -> list[dict[str, Any]]:
    """Per block and group of the float model: each modality's largest magnitude (None without tokens), the `Range` of
    its channels, and its misalignment with text."""
    device = torch.device("cpu")
    blocks = load_streamed(model, dtype="auto", device=device)
    recipe = Recipe.preset("rtn")
    plan = make_plan(blocks.model, recipe)
    state = ModalityState(modality_tokens_of(blocks.model.config))
    samples = load_samples(calibration, limit=limit)
    calibrated = Calibration(samples, batch_size, shared=False)
    inputs = calibrated.block_inputs(blocks, load_processor(model), recipe, progress)
    run = Run(blocks, recipe, plan, state, inputs, device, [], progress)
    rows = []
    for index in progress.track(range(len(plan.blocks)), "measuring", len(plan.blocks), "block"):
        targets = inputs.hidden.empty()
        statistics = run.observe(run.prepare(index), index, plan.blocks[index], targets)
        for group in plan.blocks[index]:
            found = statistics[group.name].fitting
            names = [m.value for m in state.tokens.modalities]
            described = describe_ranges(found.absmax, found.counts > 0, names)
            absmax = {n: described["channels"][n]["max"] if n in described["channels"] else None for n in names}
            rows.append({"block": index, "group": group.name, "absmax": absmax, **described})
        for i in range(len(targets)):
            inputs.hidden[i] = targets[i]
    return rows
