# SPDX-License-Identifier: Apache-2.0
"""How long a run will take, how much memory and disk: its parts, tried on some batches and blocks, and scaled up.

What is measured is the run's own code on this machine, so that recipes, widths, kernels and disks need no model of
their own. Capturing inputs is scaled by the tokens of batches of like media. Of a block, running it grows with the
tokens, and solving it does not. What the first batch and the first block take more than the next is counted once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import AbstractBlocks
from .calibration.block_inputs import BlockInputs, map_tensors
from .calibration.dataset import Sample
from .calibration.encoding import estimated_tokens, in_batches
from .calibration.gradients import SPILLED_STATE_BYTES
from .checkpoint.shards import write_model
from .checkpoint.store import BlockStore
from .errors import DataError
from .integrations.loading import StreamedBlocks, file_digests, part_writer
from .measuring import Clock, Stages, peak_memory, reset_peak_memory
from .modality import ModalityState
from .models import decoder_blocks, modality_tokens_of
from .pipeline import (
    Calibration,
    held_back_ids,
    learned_rotation,
    rotate_stream,
    rotation_pays,
    without_inexact,
)
from .plan import Plan
from .progress import AbstractProgress, NoProgress
from .recipe import Recipe
from .run import Run
from .runtime.head import quantize_head
from .runtime.outer import quantize_encoders

MIN_BATCHES = 3
MIN_BLOCKS = 3
PER_TOKEN = ("observe", "advance")  # stages of a block whose time grows with the tokens


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        seconds: in all.
        stages: seconds by stage, as the run's report has them.
        peak_memory: bytes of the process.
        peaks: the same by stage.
        output: bytes of the checkpoint's weights.
        disk: bytes that are on disk at most beside the model: finished blocks, the checkpoint, spilled hidden states.
        share: of the samples' tokens that were tried.
        blocks: that were tried.
    """

    seconds: float
    stages: Mapping[str, float]
    peak_memory: int
    peaks: Mapping[str, int]
    output: int
    disk: int
    share: float
    blocks: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "seconds": self.seconds,
            "stages": dict(self.stages),
            "peak_memory": self.peak_memory,
            "peaks": dict(self.peaks),
            "output_bytes": self.output,
            "disk_bytes": self.disk,
            "share_of_tokens_tried": self.share,
            "blocks_tried": self.blocks,
        }


class _FirstBlocks(AbstractBlocks):
    """The first blocks of a model, to try things on."""

    def __init__(self, blocks: AbstractBlocks, count: int) -> None:
        self.model, self.family, self._blocks, self._count = blocks.model, blocks.family, blocks, count

    def __len__(self) -> int:
        return self._count

    def prefix(self, index: int) -> str:
        return self._blocks.prefix(index)

    def copy(self, index: int) -> nn.Module:
        return self._blocks.copy(index)

    def take(self, index: int) -> nn.Module:
        return self._blocks.copy(index)

    def finish(self, block: nn.Module) -> None:
        block.to("meta")

    def leave_rest(self) -> None:
        pass

    def add(self, name: str, tensor: Tensor) -> None:
        pass


def kinds_of(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Kinds of media in a batch."""
    return tuple(sorted({kind for sample in samples for kind in sample.media}))


def padded_tokens(samples: Sequence[Sample]) -> int:
    """About how many tokens a batch has, with padding."""
    return len(samples) * max(map(estimated_tokens, samples))


def batches_to_try(
    samples: Sequence[Sample], batch_size: int, *, mixed: bool
) -> tuple[list[list[Sample]], list[float]]:
    """Some of the batches that a run forms: the largest, the middle one of every kind of media, and more up to a few.

    Returns:
        The batches in the run's order, and per batch how many times its time is to be counted, so that together they
        stand for all: tokens of its kind of media over the tokens tried of it.
    """
    batches = in_batches(samples, batch_size, mixed=mixed)
    sizes = [padded_tokens(batch) for batch in batches]
    by_kind: dict[tuple[str, ...], list[int]] = {}
    for number, batch in enumerate(batches):
        by_kind.setdefault(kinds_of(batch), []).append(number)
    chosen = {max(range(len(batches)), key=sizes.__getitem__), *(own[len(own) // 2] for own in by_kind.values())}
    for number in range(0, len(batches), max(len(batches) // MIN_BATCHES, 1)):
        if len(chosen) < MIN_BATCHES:
            chosen.add(number)
    weights = {}
    for own in by_kind.values():
        tried = [number for number in own if number in chosen]
        weights.update(dict.fromkeys(tried, sum(sizes[n] for n in own) / sum(sizes[n] for n in tried)))
    return [batches[n] for n in sorted(chosen)], [weights[n] for n in sorted(chosen)]


def kinds_of_blocks(blocks: AbstractBlocks) -> list[tuple[Any, ...]]:
    """Per block, what tells its kind: its linears' names and shapes."""
    found = []
    for block in decoder_blocks(blocks.model):
        shapes = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
        found.append((type(block).__name__, tuple(sorted(shapes.items()))))
    return found


def blocks_to_try(kinds: Sequence[Any]) -> int:
    """How many of the first blocks show every kind, and at least a few."""
    needed = max(kinds.index(kind) for kind in set(kinds)) + 1
    return min(max(needed, MIN_BLOCKS), len(kinds))


def for_all_blocks(values: Sequence[float], kinds: Sequence[Any], special: int = 0) -> float:
    """The sum over all blocks of something known of the first blocks.

    Args:
        values: of the first blocks.
        kinds: of all blocks.
        special: one of the first that stands for itself, as it warms up; the others stand for their kind.
    """
    own: dict[Any, list[float]] = {}
    for index, value in enumerate(values):
        if index != special:
            own.setdefault(kinds[index], []).append(value)
    own.setdefault(kinds[special], [values[special]])
    means = {kind: sum(found) / len(found) for kind, found in own.items()}
    return values[special] + sum(means[kind] for index, kind in enumerate(kinds) if index != special)


def scaled(seconds: Mapping[str, float], ratio: float) -> float:
    """Seconds of a block's stages with `ratio` times the tokens."""
    return sum(value * (ratio if stage in PER_TOKEN else 1.0) for stage, value in seconds.items())


def tensor_bytes_in(value: Any) -> int:
    """Of all tensors in nested tuples, lists and dicts, each counted once."""
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        sizes[id(tensor)] = tensor.nbytes
        return tensor

    map_tensors(value, count)
    return sum(sizes.values())


@dataclass
class Trial:
    """A run's parts, tried one after the other.

    Attributes:
        stages: seconds expected of the whole run.
        peaks: bytes of the process while each stage was tried.
    """

    stages: Stages
    peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note the peak memory of a stage."""
        reset_peak_memory()
        try:
            yield
        finally:
            self.peaks[name] = max(self.peaks.get(name, 0), peak_memory())

    def expect(self, name: str, seconds: float) -> None:
        """More seconds of a stage of the whole run."""
        self.stages.seconds[name] = self.stages.seconds.get(name, 0.0) + seconds


@torch.no_grad()
def estimate(
    blocks: StreamedBlocks,
    plan: Plan,
    processor: Any,
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    batch_size: int,
    device: torch.device,
    memory: int | None,
    stages: Stages | None = None,
    progress: AbstractProgress | None = None,
) -> Estimate:
    """Try the parts of a run.

    Args:
        blocks: of the float model, which is given up: its other tensors are on the meta device in the end.
        plan: of the recipe.
        processor: of the model.
        samples: all that the run will have.
        recipe: of the run.
        batch_size, device: of the run.
        memory: as `pipeline.Calibration` has it.
        stages: seconds of what came before: loading, hashing.
        progress: receives the blocks that are tried.

    Raises:
        DataError: there are no samples.
    """
    if not samples:
        raise DataError("no samples: an estimate needs at least one")
    progress = progress or NoProgress()
    recipe, _ = without_inexact(recipe, plan.family)
    kinds = kinds_of_blocks(blocks)
    count = blocks_to_try(kinds)
    first = _FirstBlocks(blocks, count)
    trial = Trial(stages or Stages(), {"reading": peak_memory()})
    tried, weights = batches_to_try(samples, batch_size, mixed=blocks.family.mixes_media)
    chosen = [sample for batch in tried for sample in batch]
    calibration = Calibration(chosen, batch_size, shared=False, memory=memory)
    with trial.stage("inputs"):
        quantize_encoders(blocks.model, plan.encoders)
        inputs, ratio = _try_inputs(trial, calibration, tried, weights, blocks, processor, recipe)
    gradients = None
    if recipe.needs_gradients:
        with trial.stage("gradients"):
            clock = Clock()
            gradients = calibration.gradients(first, recipe, inputs, device, clock)
            steps = clock.seconds["measuring gradients"]
            forward, backward = steps[:count], steps[count : 2 * count]
            both = for_all_blocks(forward, kinds) + for_all_blocks(backward[::-1], kinds, special=count - 1)
            trial.expect("gradients", ratio * both)
    with tempfile.TemporaryDirectory() as folder:
        store = BlockStore(Path(folder) / "run", {}, resume=False, write=part_writer(blocks.model))
        blocks.store = store
        with trial.stage("head"), trial.stages.timed("head"):
            if recipe.quantize_lm_head:
                quantize_head(blocks.model)
            blocks.leave_rest()
        with trial.stage("blocks"):
            few = replace(plan, blocks=plan.blocks[:count])
            few = replace(few, packed_bytes=sum(g.packed_bytes for groups in few.blocks for g in groups))
            state = ModalityState(modality_tokens_of(blocks.model.config))
            held = held_back_ids(samples, recipe.selection.held_back) if recipe.selection else set()
            run = _try_rotations(trial, Run(first, recipe, few, state, inputs, device, [], NoProgress()), kinds, ratio)
            run.held_back = held_in_trial([sample.id for sample in chosen], held)
            run.gradients, run.moment_bytes = gradients, memory
            _try_blocks(trial, run, kinds, ratio, store, progress)
        output = _try_writing(trial, store, kinds, Path(folder) / "out")
    peaks, spilled = _grown(trial.peaks, inputs, recipe, ratio, len(kinds), count, memory)
    return Estimate(
        trial.stages.total,
        dict(trial.stages.seconds),
        max(peaks.values()),
        peaks,
        output,
        2 * output + spilled,
        1 / ratio,
        count,
    )


def held_in_trial(tried: Sequence[str], held: Collection[str]) -> set[str]:
    """Which tried samples are held back, so that candidates are judged on about as many tokens as in the whole run:
    as many as the run holds back, if that leaves half of them.

    Args:
        tried: ids of the samples that are tried.
        held: ids of those that the run holds back.
    """
    count = min(len(held), len(tried) // 2)
    own = [name for name in tried if name in held]
    return set([*own, *(name for name in tried if name not in held)][:count])


def _try_inputs(
    trial: Trial,
    calibration: Calibration,
    tried: Sequence[Sequence[Sample]],
    weights: Sequence[float],
    blocks: AbstractBlocks,
    processor: Any,
    recipe: Recipe,
) -> tuple[BlockInputs, float]:
    """The blocks' inputs on the tried batches, and how many times their tokens the run has."""
    warming, clock = Clock(), Clock()
    small = min(range(len(tried)), key=lambda i: padded_tokens(tried[i]))
    Calibration(tried[small], calibration.batch_size, shared=False).block_inputs(blocks, processor, recipe, warming)
    inputs = calibration.block_inputs(blocks, processor, recipe, clock)
    (first,), seconds = warming.seconds["reading samples"], clock.seconds["reading samples"]
    expected = sum(s * w for s, w in zip(seconds, weights, strict=True))
    trial.expect("inputs", expected + max(first - seconds[small], 0.0))
    tokens = [batch.ids.numel() for batch in inputs.batches]
    return inputs, sum(n * w for n, w in zip(tokens, weights, strict=True)) / sum(tokens)


def _try_rotations(trial: Trial, run: Run, kinds: Sequence[Any], ratio: float) -> Run:
    """Decide on rotations and rotate the inputs as the whole run does; the run with its recipe and inputs."""
    recipe = run.recipe
    if recipe.rotation is not None and recipe.rotation.compare:
        pays = [True]
        trial.expect("rotations", _block_seconds(run, lambda: pays.append(rotation_pays(run)[0]), ratio))
        recipe = recipe if pays[-1] else replace(recipe, rotation=None)
    taken = Stages()
    with taken.timed("learned"):
        learned = learned_rotation(run.blocks, recipe, run.device, NoProgress())
    trial.expect("rotations", taken.total * len(kinds) / len(run.plan.blocks))
    inputs = rotate_stream(run.inputs, recipe, run.blocks.hidden_size, learned)
    return replace(run, recipe=recipe, inputs=inputs, learned_rotation=learned, notes=[], sites={})


def _block_seconds(run: Run, work: Callable[[], object], ratio: float) -> float:
    """Seconds of some work on a block in the whole run."""
    run.stages = Stages()
    with run.stages.timed("rest"):
        work()
    return scaled(run.stages.seconds, ratio)


def _try_blocks(
    trial: Trial, run: Run, kinds: Sequence[Any], ratio: float, store: BlockStore, progress: AbstractProgress
) -> None:
    """Quantize the first blocks."""
    if run.recipe.budget is not None:
        run.progress = clock = Clock()
        run.spend()
        trial.expect("losses", ratio * for_all_blocks(clock.seconds["expecting losses"], kinds))
    count = len(run.plan.blocks)
    indices = progress.track(range(count), "trying blocks", count, "block")
    taken = [_block_seconds(run, partial(run.block, index, store), ratio) for index in indices]
    trial.expect("blocks", for_all_blocks(taken, kinds))


def _try_writing(trial: Trial, store: BlockStore, kinds: Sequence[Any], folder: Path) -> int:
    """Bytes of the whole checkpoint, after its tried part was put together and read for checksums."""
    files = store.files()
    sizes = [file.stat().st_size for file in files if file.name.startswith("block-")]
    held = sum(file.stat().st_size for file in files)
    whole = held - sum(sizes) + round(for_all_blocks(sizes, kinds))
    folder.mkdir()
    taken = Stages()
    with taken.timed("writing"):
        write_model(files, folder, limit=2**62)
        file_digests(sorted(folder.glob("*.safetensors")), NoProgress())
    trial.expect("writing", taken.total * whole / held)
    return whole


def _grown(
    peaks: Mapping[str, int],
    inputs: BlockInputs,
    recipe: Recipe,
    ratio: float,
    blocks: int,
    tried: int,
    memory: int | None,
) -> tuple[dict[str, int], int]:
    """Peak bytes by stage with all samples and blocks, and bytes of hidden states that go to disk."""
    hidden = sum(inputs.hidden[i].nbytes for i in range(len(inputs.hidden)))
    calls = sum(tensor_bytes_in((batch.calls, batch.ids, batch.mask, batch.answers)) for batch in inputs.batches)
    bound = hidden * ratio if memory is None else min(hidden * ratio, memory)
    more = int(max(bound - hidden, 0) + calls * (ratio - 1))
    states = int(min((blocks + 1) * bound, SPILLED_STATE_BYTES if memory is None else memory))
    found = dict(peaks)
    learned = recipe.smoothing.learned
    sets = 3 if learned is not None and learned.target == "float_chain" else 2  # inputs, targets, the float chain
    for stage, others in (("inputs", 0), ("gradients", 0), ("head", 0), ("blocks", sets - 1)):
        if stage in found:
            found[stage] += more + others * int(max(bound - hidden, 0))
    if "gradients" in found:
        found["gradients"] += max(states - (tried + 1) * hidden, 0)
    return found, int(2 * max(hidden * ratio - bound, 0))
