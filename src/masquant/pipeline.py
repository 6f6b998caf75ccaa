# SPDX-License-Identifier: Apache-2.0
"""The story: a model, samples and a recipe in; the model quantized in place and a report out.

For each decoder block, in order: collect statistics per modality while the block runs in floating point on what the
quantized blocks before it give; learn smoothing vectors if the recipe says so; solve its linear groups (vectors, base
weight, patches); fold and put the quantized linears in place; run it again for the next block.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from .block import stream_samples
from .blocks import AbstractBlocks, ResidentBlocks
from .calibration.block_inputs import BlockInputs, HiddenStates, capture_block_inputs
from .calibration.dataset import Sample, load_samples
from .calibration.encoding import SampleEncoder, in_batches
from .calibration.gradients import TokenGradients, token_gradients
from .calibration.media import content_digest
from .checkpoint.format import CheckpointFormat, HeadFormat, make_format
from .checkpoint.store import BlockStore, digest, tensor_digest
from .distributed import gather, own_range, rank, world_size
from .errors import DataError, RecipeError
from .integrations.transformers import adopt
from .measuring import Stages, peak_memory
from .modality import Modality, ModalityState, attach_routing
from .models import ModelFamily, decoder_of, family_of, modality_tokens_of
from .plan import encoder_schemes, make_plan, tensor_bytes
from .progress import AbstractProgress, NoProgress
from .recipe import Recipe
from .rotation_learning import learn_rotation
from .run import Run
from .runtime.head import packed_head_bytes, quantize_head
from .runtime.outer import packed_bytes, quantize_encoders, restore_encoders
from .runtime.transforms import LEARNED_ROTATION, attach_residual_rotation
from .version import __version__

COMPARED_BLOCKS = 2  # on which rotations are tried
WORST_CHANGE = 1.25  # of a modality's error, up to which rotations that help the others are kept


@dataclass
class QuantizationReport:
    """What was done, for report.json.

    Attributes:
        model: hub id of the float model, or the name of its folder; empty if unknown.
        recipe: resolved.
        format: of the checkpoint.
        calibration: samples and tokens per modality.
        blocks: one record per block.
        bytes: of the decoder's linears: packed, smooth_scale, compensation, and float before; of embeddings and head,
            if they have 8-bit rows: lm_head, and before; of encoders' 8-bit linears: encoders, and before; kept: of
            all else.
        not_quantized: modules and patterns of linears in floating point.
        notes: what a user should know.
        seconds, peak_memory: of the whole run; bytes of the process.
        stages: seconds by stage.
    """

    model: str
    recipe: Recipe
    format: CheckpointFormat
    calibration: dict[str, Any]
    blocks: list[dict[str, Any]]
    bytes: dict[str, int]
    not_quantized: list[str]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)

    def with_cost(self, stages: Stages) -> QuantizationReport:
        """The same with what the run took up to this moment."""
        return replace(self, seconds=stages.total, peak_memory=peak_memory(), stages=dict(stages.seconds))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "version": __version__,
            "versions": {
                "masquant": __version__,
                "torch": torch.__version__,
                "transformers": transformers_version,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
            "model": self.model,
            "modalities": [m.value for m in self.format.modalities],
            "recipe": self.recipe.to_dict(),
            "not_quantized": self.not_quantized,
            "method": self.recipe.method,
            "scheme": self.recipe.scheme.name,
            "calibration": self.calibration,
            "bytes": self.bytes,
            "notes": self.notes,
            "seconds": self.seconds,
            "stages": dict(self.stages),
            "peak_memory": self.peak_memory,
            "blocks": self.blocks,
        }


@torch.no_grad()
def quantize(
    model: PreTrainedModel,
    processor: Any,
    samples: str | Path | Iterable[Mapping[str, Any] | Sample] | Calibration,
    *,
    scheme: str = "W4A8",
    recipe: Recipe | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: AbstractProgress | None = None,
    work_folder: Path | None = None,
    resume: bool = False,
) -> QuantizationReport:
    """Quantize a model in place; `model.save_pretrained` then writes a packed checkpoint.

    Args:
        model: a supported multimodal model in floating point, as transformers loads it.
        processor: its processor.
        samples: calibration data: a folder with metadata.jsonl, a dataset, or an iterable of samples; or a
            `Calibration` that several recipes of one model share.
        scheme: W8A8, W4A8, W4A6 or W4A16, for the default recipe; ignored if `recipe` is given.
        recipe: what to do; default the `masquant` preset.
        batch_size: samples that run together.
        device: where blocks are solved; default where the model is.
        progress: receives what happens.
        work_folder: keeps finished blocks, so that an interrupted run can go on.
        resume: go on from `work_folder`.

    Raises:
        MasquantError: see its children; the model is unchanged if the error comes before the first block.
    """
    recipe = recipe or Recipe.preset("masquant", scheme)
    make_plan(model, recipe)  # refuses before anything is read
    calibration = (
        samples if isinstance(samples, Calibration) else Calibration(load_samples(samples), batch_size, shared=False)
    )
    store = None
    if work_folder is not None and rank() == 0:
        fingerprint = run_fingerprint({"tensors": tensor_digest(dict(model.state_dict()))}, recipe, calibration)
        store = BlockStore(work_folder, fingerprint, resume=resume)
    device, progress = torch.device(device or model.device), progress or NoProgress()
    report, state = quantize_blocks(ResidentBlocks(model), processor, calibration, recipe, device, progress, store)
    attach_routing(model, decoder_of(model), state)
    attach_residual_rotation(decoder_of(model), report.recipe.rotations, family_of(model.config).stream_inputs)
    adopt(model, report.format)
    return report


@torch.no_grad()
def quantize_blocks(
    blocks: AbstractBlocks,
    processor: Any,
    calibration: Calibration,
    recipe: Recipe,
    device: torch.device,
    progress: AbstractProgress,
    store: BlockStore | None,
    stages: Stages | None = None,
) -> tuple[QuantizationReport, ModalityState]:
    """Quantize a model's blocks one after the other, wherever they come from and go to.

    Args:
        blocks: of the float model.
        processor: the model's.
        calibration: its samples.
        recipe: what to do.
        device: where blocks are solved.
        progress: receives what happens.
        store: takes finished blocks, and gives those of an interrupted run.
        stages: counts the seconds.

    Returns:
        What was done, and the modality state that the quantized linears share.
    """
    stages = stages or Stages()
    model = blocks.model.eval()
    plan = make_plan(model, recipe)
    recipe, left_out = without_inexact(recipe, plan.family)
    state = ModalityState(modality_tokens_of(model.config))
    replaced = quantize_encoders(model, plan.encoders)  # first, so that the decoder is fitted to what they really give
    encoder_bytes = packed_bytes([model.get_submodule(path) for path in replaced])
    try:
        with stages.timed("inputs"):
            inputs = calibration.block_inputs(blocks, processor, recipe, progress)
        with stages.timed("gradients"):
            gradients = calibration.gradients(blocks, recipe, inputs, device, progress)
    except BaseException:
        restore_encoders(model, replaced)
        raise
    del replaced
    with stages.timed("head"):
        whole = tensor_bytes(model)
        head = HeadFormat(quantize_head(model)) if recipe.quantize_lm_head else None
        head_bytes = packed_head_bytes(model)
        head_before = whole - tensor_bytes(model) + head_bytes
        blocks.leave_rest()
    counts = modality_counts(inputs, state.tokens.modalities)
    notes = [*plan.notes, *left_out, *missing_notes(counts)]
    for note in notes:
        progress.note(note)
    with stages.timed("rotations"):
        if recipe.rotation is not None and recipe.rotation.compare:
            rotated, note = rotation_pays(Run(blocks, recipe, plan, state, inputs, device, [], progress))
            notes.append(note)
            recipe = recipe if rotated else replace(recipe, rotation=None)
        learned = learned_rotation(blocks, recipe, device, progress)
        if learned is not None:
            blocks.add(LEARNED_ROTATION, learned)
        inputs = rotate_stream(inputs, recipe, blocks.hidden_size, learned)
    held_back = held_back_ids(calibration.samples, recipe.selection.held_back) if recipe.selection else set()
    if recipe.selection and not held_back:
        notes.append(
            "no task has the four calibration samples that holding one back needs: no candidates were compared"
        )
        progress.note(notes[-1])
    run = Run(blocks, recipe, plan, state, inputs, device, notes, progress, held_back, gradients)
    run.learned_rotation = learned
    run.moment_bytes = calibration.memory
    with stages.timed("losses"):
        run.spend()
    records = []
    done = [0, 0]
    for index in progress.track(range(len(plan.blocks)), "quantizing", len(plan.blocks), "block"):
        with stages.timed("blocks"):
            records.append(run.block(index, store))
        done[0] += (
            sum(p.in_features * p.out_features for g in plan.blocks[index] for p in g.linears) * run.dtype.itemsize
        )
        done[1] += sum(sum(g["bytes"].values()) for g in records[-1]["groups"])
        progress.status(
            f"{done[0] / 2**20:.0f} -> {done[1] / 2**20:.0f} MiB, peak memory {peak_memory() / 2**30:.2f} GiB"
        )
    checkpoint = make_format(
        plan.family,
        run.plan.blocks,
        recipe.scheme.input_activations,
        recipe.ignore,
        run.sites,
        recipe.rotations,
        head,
        encoder_schemes(plan.family, recipe),
    )
    used = {"num_samples": len(calibration.samples), "tokens": {m.value: n for m, n in counts.items()}}
    sizes = {key: sum(g["bytes"][key] for r in records for g in r["groups"]) for key in
             ("packed", "smooth_scale", "compensation")}  # fmt: skip
    report = QuantizationReport(
        model_name(model),
        recipe,
        checkpoint,
        used,
        records,
        {
            **sizes,
            "float_before": plan.float_bytes,
            "lm_head": head_bytes,
            "lm_head_before": head_before,
            "encoders": encoder_bytes,
            "encoders_before": plan.encoder_bytes,
            "kept": plan.other_bytes - head_before - plan.encoder_bytes,
        },
        [name for name in plan.not_quantized if head is None or name not in ("embeddings", "lm_head")],
        notes,
    )
    return report.with_cost(stages), state


def model_name(model: PreTrainedModel) -> str:
    """Hub id that a model was loaded by, or the name of its folder."""
    name = str(model.config.name_or_path)
    return Path(name).resolve().name if Path(name).is_dir() else name


def run_fingerprint(model: Mapping[str, str], recipe: Recipe, calibration: Calibration) -> dict[str, Any]:
    """All that determines what a run writes: digests of the model, the recipe, digests of the samples, versions."""
    return {
        "model": dict(model),
        "recipe": recipe.to_dict(),
        "calibration": {s.id: sample_digest(s) for s in calibration.samples},
        "batch_size": calibration.batch_size,
        "versions": {"masquant": __version__, "torch": torch.__version__, "transformers": transformers_version},
    }


def sample_digest(sample: Sample) -> str:
    """SHA-256 over a sample's words and the content of its media, not where they lie."""
    words = {name: getattr(sample, name) for name in ("id", "task", "prompt", "answer", "text")}
    return digest({**words, **{kind: content_digest(getattr(sample, kind)) for kind in sample.media}})


def held_back_ids(samples: Sequence[Sample], share: float) -> set[str]:
    """Ids of the samples that only decide: every n-th of each task, at least one where a task has four."""
    by_task: dict[str, list[str]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample.id)
    chosen: set[str] = set()
    for ids in by_task.values():
        count = max(round(share * len(ids)), 1) if len(ids) >= 4 else 0
        chosen.update(ids[i * len(ids) // count] for i in range(count))
    return chosen


class Calibration:
    """Samples, and what all recipes for one model get from them: the blocks' inputs, captured when first asked for,
    and the answers' gradients, measured when a recipe first needs them."""

    def __init__(
        self,
        samples: Sequence[Sample],
        batch_size: int = 8,
        *,
        shared: bool = True,
        memory: int | None = None,
        folder: Path | None = None,
    ) -> None:
        """Take samples.

        Args:
            samples: at least one.
            batch_size: samples that run together.
            shared: whether more than one recipe will use it.
            memory: bytes that one set of hidden states, and the second moments collected together, may take in memory;
                None for all.
            folder: where the rest goes; default the system's temporary folder.

        Raises:
            DataError: there are none.
        """
        if not samples:
            raise DataError("no samples: calibration needs at least one")
        self.samples, self.batch_size = samples, batch_size
        self.shared, self.memory, self.folder = shared, memory, folder
        self._inputs: dict[str, BlockInputs] = {}  # by what the recipe does to encoders
        self._gradients: dict[tuple[str, int, int], TokenGradients] = {}

    def block_inputs(
        self, blocks: AbstractBlocks, processor: Any, recipe: Recipe, progress: AbstractProgress
    ) -> BlockInputs:
        """What the decoder's blocks are called with: encoders (quantized, if the recipe says so) and embeddings run on
        the samples."""
        inputs = self._inputs.get(_encoders_key(recipe))
        if inputs is None:
            parts = in_batches(self.samples, self.batch_size, mixed=blocks.family.mixes_media)
            own = own_range(len(parts))
            total = len(own)
            if not min(gather(total)):
                raise DataError(
                    f"{len(self.samples)} samples in batches of {self.batch_size} are too few for {world_size()} "
                    "processes; take a smaller --batch-size, more samples or fewer processes"
                )
            encoder = SampleEncoder(processor)
            batches = (encoder.encode(parts[i]) for i in own)
            tracked = progress.track(batches, "reading samples", total, "batch")
            inputs = capture_block_inputs(
                blocks.model,
                tracked,
                modality_tokens_of(blocks.model.config),
                first=blocks.copy(0).to(blocks.model.device),
                hidden=HiddenStates(self.memory, self.folder),
            )
            inputs = replace(inputs, first=own.start)
        if not self.shared:
            return inputs
        self._inputs[_encoders_key(recipe)] = inputs
        return inputs.copy()

    def gradients(
        self,
        blocks: AbstractBlocks,
        recipe: Recipe,
        inputs: BlockInputs,
        device: torch.device,
        progress: AbstractProgress,
    ) -> TokenGradients | None:
        """How much the answers depend on each token, if the recipe asks for it.

        Measured before the model is rotated, which leaves the norms of the gradients as they are.

        Raises:
            DataError: no sample has an answer or a text.
        """
        if not recipe.needs_gradients:
            return None
        if not any(gather(any(bool(batch.answers.any()) for batch in inputs.batches))):
            raise DataError("no calibration sample has an answer or a text: nothing to measure gradients of")
        key = _encoders_key(recipe), recipe.gradient.samples, recipe.seed
        if key not in self._gradients:
            self._gradients[key] = token_gradients(
                blocks, inputs, samples=key[1], seed=key[2], device=device, progress=progress
            )
        return self._gradients[key]


def _encoders_key(recipe: Recipe) -> str:
    """What determines the encoders that a recipe gives: nothing of it where they stay in floating point."""
    plain = recipe.to_dict()
    return json.dumps([plain["encoders"], plain["ignore"]], sort_keys=True) if recipe.encoders else ""


def rotation_pays(run: Run) -> tuple[bool, str]:
    """Whether the model's first blocks lose less with the recipe's rotations than without, and what to report.

    Both are rounded in the simplest way, on copies. The errors of the blocks' outputs must fall on the geometric mean
    over blocks and modalities, and grow much for no modality.
    """
    recipe = run.recipe.fast()
    count = min(COMPARED_BLOCKS, len(run.plan.blocks))
    change: dict[str, float] = {}
    for candidate, sign in ((recipe, 1), (replace(recipe, rotation=None), -1)):
        inputs = rotate_stream(run.inputs.copy(), candidate, run.blocks.hidden_size, None)
        trial = replace(run, recipe=candidate, inputs=inputs, notes=[], sites={})
        for index in range(count):
            for modality, error in trial.rehearse(index).items():
                change[modality] = change.get(modality, 0.0) + sign * math.log(max(error, 1e-30)) / count
    factors = {modality: math.exp(value) for modality, value in change.items()}
    pays = sum(change.values()) < 0 and max(factors.values()) < WORST_CHANGE
    words = ", ".join(f"{modality} by {factor:.2f}" for modality, factor in factors.items())
    return pays, f"rotations multiply the error of the first blocks: {words}; {'kept' if pays else 'left out'}"


def learned_rotation(
    blocks: AbstractBlocks, recipe: Recipe, device: torch.device, progress: AbstractProgress
) -> Tensor | None:
    """The learned part of the residual stream's rotation [hidden, hidden], if the recipe has one."""
    args = recipe.rotation.learned if recipe.rotation else None
    if args is None:
        return None
    size = blocks.hidden_size
    assert recipe.rotations is not None
    rotation = recipe.rotations.of_residual(size)
    assert rotation is not None
    group_size = recipe.scheme.weights.group_size_for(size) or size
    readers, writers = [], []
    for index in range(len(blocks)):
        reads, writes = stream_samples(blocks.copy(index), blocks.family, rotation, group_size, args.rows)
        readers += [rows.to(device) for rows in reads]
        writers += [columns.to(device) for columns in writes]
    found = learn_rotation(readers, writers, group_size, args)
    progress.note(
        f"learned rotation: mean squared range of the weights' groups {found.before:.3f} -> {found.after:.3f}"
    )
    return found.matrix


def rotate_stream(inputs: BlockInputs, recipe: Recipe, size: int, learned: Tensor | None) -> BlockInputs:
    """The inputs with their hidden states rotated (in place), where the recipe rotates the residual stream."""
    rotation = recipe.rotations.of_residual(size, learned) if recipe.rotations else None
    if rotation is None:
        return inputs
    for i in range(len(inputs.hidden)):
        inputs.hidden[i] = rotation.apply(inputs.hidden[i])
    return replace(inputs, rotation=rotation)


def without_inexact(recipe: Recipe, family: ModelFamily) -> tuple[Recipe, list[str]]:
    """The recipe without what the family cannot do exactly, and what to report of that.

    Raises:
        RecipeError: it learns a rotation of a residual stream that cannot be rotated.
    """
    rotation = recipe.rotation
    if rotation is None or not family.unrotated or not (rotation.residual and rotation.online_transforms):
        return recipe, []
    if rotation.learned is not None:
        raise RecipeError(
            f"rotation.learned turns the residual stream, which {family.title} does not allow: {family.unrotated}; "
            "remove it from the recipe"
        )
    note = f"the residual stream of {family.title} is not rotated: {family.unrotated}"
    return replace(recipe, rotation=replace(rotation, residual=False)), [note]


def modality_counts(inputs: BlockInputs, modalities: Sequence[Modality]) -> dict[Modality, int]:
    """Calibration tokens per modality, without padding."""
    return {
        modality: sum(gather(sum(int(((b.ids == row) & b.mask).sum()) for b in inputs.batches)))
        for row, modality in enumerate(modalities)
    }


def missing_notes(counts: Mapping[Modality, int]) -> list[str]:
    """What to say of modalities without calibration tokens."""
    return [
        f"no {m.value} tokens in the calibration samples: {m.value} keeps text's vectors and gets no patch"
        for m, n in counts.items()
        if n == 0 and m is not Modality.TEXT
    ]
