# SPDX-License-Identifier: Apache-2.0
"""How long a run will take and how much memory: its parts, tried on a few samples and one block, and scaled up.

What is measured is the run's own code on this machine, so that recipes, widths, kernels and disks need no model of
their own. Capturing inputs grows with the samples' tokens; of a block, running it grows with the tokens, and solving
it does not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .blocks import AbstractBlocks
from .calibration.dataset import Sample
from .calibration.encoding import by_length, estimated_tokens
from .calibration.gradients import token_gradients
from .checkpoint.store import write_tensors
from .errors import DataError
from .modality import ModalityState
from .models import modality_tokens_of
from .pipeline import COMPARED_BLOCKS, Calibration, rotate_stream, without_inexact
from .plan import Plan
from .progress import AbstractProgress, NoProgress
from .recipe import Recipe
from .run import Run, peak_memory, reset_peak_memory
from .runtime.outer import quantize_encoders

TRIED_BATCHES = 2
PER_TOKEN = ("observe", "advance")  # stages of a block whose time grows with the tokens


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        seconds: in all.
        stages: seconds by stage.
        peak_memory: bytes of the process.
        peaks: the same by stage.
        share: of the samples' tokens that were tried.
    """

    seconds: float
    stages: Mapping[str, float]
    peak_memory: int
    peaks: Mapping[str, int]
    share: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "seconds": self.seconds,
            "stages": dict(self.stages),
            "peak_memory": self.peak_memory,
            "peaks": dict(self.peaks),
            "share_of_tokens_tried": self.share,
        }


@dataclass
class Trial:
    """Seconds and peak bytes measured of a run's stages."""

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def measured(self, stage: str, start: float) -> None:
        """A stage that began at `start` is over."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start
        self.peaks[stage] = max(self.peaks.get(stage, 0), peak_memory())
        reset_peak_memory()


class _FirstBlocks(AbstractBlocks):
    """The first blocks of a model, to try things on."""

    def __init__(self, blocks: AbstractBlocks, count: int) -> None:
        self.model, self.family, self._blocks, self._count = blocks.model, blocks.family, blocks, count

    def __len__(self) -> int:
        return self._count

    def copy(self, index: int) -> torch.nn.Module:
        return self._blocks.copy(index)

    def take(self, index: int) -> torch.nn.Module:
        return self._blocks.copy(index)

    def finish(self, block: torch.nn.Module) -> None:
        pass

    def leave_rest(self) -> None:
        pass

    def add(self, name: str, tensor: torch.Tensor) -> None:
        pass


def some_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples, evenly spread over the order of their lengths."""
    ordered = by_length(samples)
    count = min(count, len(ordered))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def scaled(seconds: Mapping[str, float], ratio: float, times: float = 1.0) -> float:
    """Seconds of a block's stages with `ratio` times the tokens, `times` over."""
    return times * sum(value * (ratio if stage in PER_TOKEN else 1.0) for stage, value in seconds.items())


@torch.no_grad()
def estimate(
    blocks: AbstractBlocks,
    plan: Plan,
    processor: Any,
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    batch_size: int,
    device: torch.device,
    memory: int | None,
    reading: float = 0.0,
    progress: AbstractProgress | None = None,
) -> Estimate:
    """Try the parts of a run.

    Args:
        blocks: of the float model; they are not changed, its encoders are as the recipe says.
        plan: of the recipe.
        processor: of the model.
        samples: all that the run will have.
        recipe: of the run.
        batch_size, device: of the run.
        memory: as `pipeline.Calibration` has it.
        reading: seconds of what came before: loading, hashing.
        progress: receives the stages.

    Raises:
        DataError: there are no samples.
    """
    if not samples:
        raise DataError("no samples: an estimate needs at least one")
    progress = progress or NoProgress()
    recipe, _ = without_inexact(recipe, plan.family)
    tried = some_samples(samples, TRIED_BATCHES * batch_size)
    ratio = sum(map(estimated_tokens, samples)) / sum(map(estimated_tokens, tried))
    trial, stages = Trial(), {"reading": reading}
    reset_peak_memory()

    start = time.monotonic()
    calibration = Calibration(tried, batch_size, shared=False, memory=memory)
    quantize_encoders(blocks.model, plan.encoders)
    inputs = calibration.block_inputs(blocks, processor, recipe, progress)
    trial.measured("inputs", start)
    stages["inputs"] = trial.seconds["inputs"] * ratio
    if recipe.needs_gradients:
        stages["gradients"] = ratio * _try_gradients(blocks, inputs, recipe, device, trial)
    gradients = calibration.gradients(_FirstBlocks(blocks, 1), recipe, inputs, device, NoProgress())

    blocks.leave_rest()
    reset_peak_memory()
    state = ModalityState(modality_tokens_of(blocks.model.config))
    held = {s.id for s in tried[::4]} if recipe.selection else set()
    one = _FirstBlocks(blocks, 1)
    first = replace(plan, blocks=plan.blocks[:1])
    if recipe.rotation is not None and recipe.rotation.compare:
        rehearsal = Run(one, recipe.fast(), first, state, inputs.copy(), device, [], NoProgress())
        start = time.monotonic()
        rehearsal.rehearse(0)
        whole = time.monotonic() - start
        rehearsal.seconds["prepare"] = max(whole - sum(rehearsal.seconds.values()), 0.0)
        stages["rotations compared"] = scaled(rehearsal.seconds, ratio, 2 * min(COMPARED_BLOCKS, len(blocks)))
        trial.measured("blocks", start)
    inputs = rotate_stream(inputs, recipe, blocks.hidden_size, None)
    run = Run(one, recipe, first, state, inputs, device, [], NoProgress(), held, gradients)
    run.moment_bytes = memory
    if recipe.budget is not None:
        start = time.monotonic()
        run.spend()
        stages["losses expected"] = (time.monotonic() - start) * len(blocks)
    run.seconds.clear()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        block = run.prepare(0)
        run.solve(block, 0, run.plan.blocks[0])
        write_tensors(block.state_dict(), Path(folder) / "block.safetensors")
        whole = time.monotonic() - start
    run.seconds["read and write"] = max(whole - sum(run.seconds.values()), 0.0)
    trial.measured("blocks", start)
    stages["blocks"] = scaled(run.seconds, ratio, len(blocks))
    hidden = sum(inputs.hidden[i].nbytes for i in range(len(inputs.hidden)))
    more = max(min(hidden * ratio, memory or hidden * ratio) - hidden, 0)
    sets = {"inputs": 1, "gradients": 2, "blocks": 2}
    peaks = {stage: int(peak + sets[stage] * more) for stage, peak in trial.peaks.items()}
    return Estimate(sum(stages.values()), stages, max(peaks.values()), peaks, 1 / ratio)


def _try_gradients(blocks: AbstractBlocks, inputs: Any, recipe: Recipe, device: torch.device, trial: Trial) -> float:
    """Seconds of all blocks' gradients, from those of one block and of two."""
    taken = []
    for count in (1, min(2, len(blocks))):
        start = time.monotonic()
        token_gradients(
            _FirstBlocks(blocks, count),
            inputs,
            samples=recipe.gradient.samples,
            seed=recipe.seed,
            device=device,
            progress=NoProgress(),
        )
        taken.append(time.monotonic() - start)
        trial.measured("gradients", start)
    return taken[0] + max(taken[1] - taken[0], 0.0) * (len(blocks) - 1)
