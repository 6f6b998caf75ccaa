# SPDX-License-Identifier: Apache-2.0
"""Loading, saving and quantizing models on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel

from .calibration.dataset import Sample
from .card import model_card
from .checking import CHECKSUMS, check, resident_bytes, write_checksums
from .checkpoint.shards import write_model
from .checkpoint.store import BlockStore, check_output, finished_folder, partial_folder, scratch_folder, write_json
from .distributed import rank
from .errors import CheckpointError, MasquantError, ModelError
from .estimate import Estimate, estimate
from .integrations.loading import file_digests, first_line, load_any, load_streamed, meta_model, part_writer
from .integrations.transformers import adopt, quantized_linears, state_of
from .measuring import Stages
from .modality import override_ids
from .pipeline import Calibration, QuantizationReport, quantize_blocks, run_fingerprint
from .plan import make_plan
from .progress import AbstractProgress, NoProgress
from .recipe import Recipe

__all__ = [
    "check",
    "default_memory",
    "estimate_folder",
    "load",
    "load_any",
    "load_processor",
    "quantize_folder",
    "resident_bytes",
    "routed",
    "save",
]

# Files of a model directory that are weights or are written anew; all others are copied along.
_NOT_COPIED = (".safetensors", ".bin", ".pth", ".gguf", ".index.json")
_TEXT_FILES = (".json", ".txt", ".jinja", ".model")  # beside the weights: configs, tokenizer, templates
_WRITTEN = {CHECKSUMS, "config.json", "README.md", "recipe.yaml", "report.json"}
SIDE_FILE_BYTES = 200 * 2**20
SHARD_BYTES = 5 * 10**9
MEMORY_SHARE = 0.8  # of what the machine has free, which quantizing may take by default


def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a masquant checkpoint.

    Args:
        path: folder or hub id.
        kwargs: for from_pretrained, such as dtype, device_map, attn_implementation.

    Raises:
        CheckpointError: it is no masquant checkpoint, of another version, incomplete or altered.
    """
    if isinstance(path, Path) and not path.is_dir():
        raise CheckpointError(f"{path} is no folder")
    model = load_any(path, **kwargs)
    if not quantized_linears(model):
        raise CheckpointError(f"{path} is no masquant checkpoint: its config.json has no masquant quantization_config")
    return model


def routed(model: PreTrainedModel, modality_ids: Tensor) -> AbstractContextManager[None]:
    """Say the modality of each token for calls that pass `inputs_embeds` instead of `input_ids`.

    Args:
        model: quantized.
        modality_ids: uint8 [batch, tokens], positions in the checkpoint's list of modalities.
    """
    return override_ids(state_of(model), modality_ids)


def save(
    model: PreTrainedModel,
    processor: Any,
    output: Path,
    report: QuantizationReport,
    *,
    source: Path | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder: weights, processor, side files, recipe, report and model card; whole or not at all.

    Args:
        model: quantized.
        processor: its processor.
        output: folder to write, replaced if it exists.
        report: of `quantize`.
        source: folder of the float model, whose other small files are copied along.
        evaluation: for the card's table of losses, see `card.with_loss`; also goes into report.json.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    with finished_folder(output) as folder:
        model.save_pretrained(folder)
        write_extras(folder, processor, report.recipe, source)
        write_checksums(folder)
        write_record(folder, report, evaluation)


def quantize_folder(
    model: str | Path,
    output: Path,
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    memory: int | None = None,
    progress: AbstractProgress | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> QuantizationReport:
    """Quantize a model on disk into a checkpoint folder, one decoder block in memory at a time.

    Encoders, embeddings and head are in memory while the blocks' inputs are captured; then each block is read,
    quantized and written. Finished blocks are kept beside `output` until all is done. Several processes of
    torch.distributed share the samples; the first writes.

    Args:
        model: folder or hub id.
        output: folder to write.
        samples: calibration data.
        recipe: what to do.
        batch_size: samples that run together.
        device: where encoders run and blocks are solved.
        dtype: to load the model in, as from_pretrained takes it.
        memory: bytes that the process may take; hidden states that would go beyond are kept on disk. Default most of
            what the machine has free.
        progress: receives what happens.
        resume: go on with an interrupted run.
        overwrite: replace an existing output folder and an interrupted run.

    Raises:
        MasquantError: see its children; nothing is left but the finished blocks.
    """
    progress, stages = progress or NoProgress(), Stages()
    writes = rank() == 0
    work = partial_folder(output)
    with stages.timed("reading"):
        make_plan(meta_model(model, dtype), recipe)  # refuses before anything is read
        if writes:
            check_output(output, overwrite=overwrite, resume=resume)
        memory = default_memory() if memory is None else memory
        calibration = Calibration(
            samples, batch_size, shared=False, memory=memory // 8, folder=work if writes else None
        )
        processor = load_processor(model)
    with scratch_folder(output) if writes else tempfile.TemporaryDirectory() as converted:
        with stages.timed("reading"):
            blocks = load_streamed(model, dtype=dtype, device=torch.device(device), folder=Path(converted))
            fingerprint = run_fingerprint(file_digests(model_files(blocks.files), progress), recipe, calibration)
            fingerprint |= {"dtype": str(blocks.model.dtype), "device": torch.device(device).type}
            store = BlockStore(work, fingerprint, resume=resume, write=part_writer(blocks.model)) if writes else None
            blocks.store = store
        try:
            report, _ = quantize_blocks(
                blocks, processor, calibration, recipe, torch.device(device), progress, store, stages
            )
        except MasquantError:
            if store is not None and not store.finished:
                store.remove()  # nothing to go on with
            raise
    if store is None:
        return report
    adopt(blocks.model, report.format)
    with finished_folder(output, work / "finished") as folder:
        with stages.timed("writing"):
            write_model(store.files(), folder, SHARD_BYTES)
            if blocks.model.can_generate():
                blocks.model.generation_config.save_pretrained(folder)
            write_extras(folder, processor, report.recipe, Path(model) if Path(model).is_dir() else None)
            blocks.model.config.save_pretrained(work)
            write_checksums(folder, work / "config.json")
        report = report.with_cost(stages)
        write_record(folder, report)
        (work / "config.json").replace(folder / "config.json")  # last: without it nothing loads the folder
    store.remove()
    return report


def estimate_folder(
    model: str | Path,
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    memory: int | None = None,
    progress: AbstractProgress | None = None,
) -> Estimate:
    """What `quantize_folder` with these arguments will take, by trying a few samples and one block; nothing is kept.

    Raises:
        MasquantError: as `quantize_folder`.
    """
    progress, stages = progress or NoProgress(), Stages()
    memory = default_memory() if memory is None else memory
    with tempfile.TemporaryDirectory() as converted:
        with stages.timed("reading"):
            plan = make_plan(meta_model(model, dtype), recipe)
            processor = load_processor(model)
            blocks = load_streamed(model, dtype=dtype, device=torch.device(device), folder=Path(converted))
            run_fingerprint(file_digests(model_files(blocks.files), progress), recipe, Calibration(samples))
        return estimate(
            blocks,
            plan,
            processor,
            samples,
            recipe,
            batch_size=batch_size,
            device=torch.device(device),
            memory=memory // 8,
            stages=stages,
            progress=progress,
        )


def default_memory() -> int:
    """Bytes that quantizing takes at most where nothing else is asked for: most of what the machine has free."""
    return int(psutil.virtual_memory().available * MEMORY_SHARE)


def load_processor(path: str | Path) -> Any:
    """The processor of a model folder or hub id.

    Raises:
        ModelError: transformers cannot read it.
    """
    try:
        return AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a broken file makes transformers raise nearly anything
        raise ModelError(f"cannot read a processor from {path}: {first_line(error)}") from error


def model_files(weights: Sequence[Path]) -> list[Path]:
    """The files that say what a model is and does: its weights, and the small files beside them."""
    folders = {file.parent for file in weights}
    beside = (file for folder in folders for file in folder.iterdir() if file.suffix in (".safetensors", *_TEXT_FILES))
    return sorted(
        file for file in beside if file.is_file() and file.name not in ("README.md", "report.json", CHECKSUMS)
    )


def write_extras(folder: Path, processor: Any, recipe: Recipe, source: Path | None) -> None:
    """What a checkpoint folder has besides weights and configs, and that says what the model does."""
    processor.save_pretrained(folder)
    if source is not None and source.is_dir():
        copy_side_files(source, folder)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())


def write_record(folder: Path, report: QuantizationReport, evaluation: Mapping[str, Any] | None = None) -> None:
    """What a checkpoint folder says of its run: record and model card."""
    measured = {} if evaluation is None else {"evaluation": dict(evaluation)}
    write_json(folder / "report.json", {**report.to_dict(), **measured})
    (folder / "README.md").write_text(model_card(report, evaluation), encoding="utf-8")


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy the files of `source` that are neither weights nor already in `folder`."""
    for file in sorted(source.iterdir()):
        written = file.name in _WRITTEN or (folder / file.name).exists()
        small = file.is_file() and file.stat().st_size <= SIDE_FILE_BYTES
        if small and not written and not file.name.endswith(_NOT_COPIED) and not file.name.startswith("."):
            shutil.copy2(file, folder / file.name)
