# SPDX-License-Identifier: Apache-2.0
"""Loading, saving and checking quantized models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from .card import model_card
from .checkpoint.format import QUANT_METHOD, expected_tensors, parse_format
from .checkpoint.store import finished_folder, write_json
from .errors import CheckpointError, ModelError
from .integrations.transformers import build_quantized_shell, quantized_linears, read_headers, state_of, verify_tensors
from .modality import override_ids
from .models import FAMILIES, decoder_blocks
from .pipeline import QuantizationReport

# Files of a model directory that are weights or are written anew; all others are copied along.
_NOT_COPIED = (".safetensors", ".bin", ".pth", ".gguf", ".index.json")
_WRITTEN = {"config.json", "README.md", "recipe.yaml", "report.json"}
SIDE_FILE_BYTES = 200 * 2**20


def model_class(config: Any, path: str | Path) -> type[PreTrainedModel]:
    """The transformers class that a config asks for.

    Raises:
        ModelError: transformers has no such class.
    """
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ModelError(
        f"{path}: transformers {transformers.__version__} has no class for architectures {config.architectures}"
    )


def load_any(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model by the class that its config names; nothing may be missing, left over or of another shape.

    Raises:
        ModelError: transformers cannot load it.
        CheckpointError: its tensors do not fit.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read a model config from {path}: {_first_line(error)}") from error
    try:
        model, info = _from_pretrained(model_class(config, path), path, {"dtype": "auto", **kwargs})
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {path}: {_first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            first = sorted(map(str, info[problem]))[0]
            raise CheckpointError(f"{path}: {len(info[problem])} {problem.replace('_', ' ')}, such as {first}")
    return model.eval()


def _from_pretrained(
    cls: type[PreTrainedModel], path: str | Path, kwargs: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of loading it."""
    loader = PreTrainedModel.from_pretrained.__func__
    model, info = loader(cls, path, output_loading_info=True, **kwargs)
    found = next((f.side_file for f in FAMILIES if model.config.model_type in f.model_types), None)
    if found is not None:
        method, name = found
        getattr(model, method)(cached_file(path, name))
    return model, info


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
        evaluation: result of `evaluate` for the card.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    with finished_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if source is not None and source.is_dir():
            copy_side_files(source, folder)
        (folder / "recipe.yaml").write_text(report.recipe.to_yaml())
        write_json(folder / "report.json", report.to_dict())
        (folder / "README.md").write_text(model_card(model, report, source, evaluation))


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy the files of `source` that are neither weights nor already in `folder`."""
    for file in sorted(source.iterdir()):
        written = file.name in _WRITTEN or (folder / file.name).exists()
        small = file.is_file() and file.stat().st_size <= SIDE_FILE_BYTES
        if small and not written and not file.name.endswith(_NOT_COPIED) and not file.name.startswith("."):
            shutil.copy2(file, folder / file.name)


def check(path: str | Path) -> dict[str, Any]:
    """Is a checkpoint folder whole and loadable, and is nothing in floating point that should be low-bit?

    First the configuration and the safetensors headers are compared without reading weights; then the model is loaded
    and its modules and values are checked.

    Returns:
        What was found: scheme, numbers of linears, bytes.

    Raises:
        CheckpointError: naming the first thing that is wrong.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{folder} is no masquant checkpoint: config.json has no masquant quantization_config")
    checkpoint = parse_format(found)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        missing = set(json.loads(index.read_text())["weight_map"].values()) - {f.name for f in files}
        if missing:
            raise CheckpointError(f"{folder} lacks the shard {sorted(missing)[0]}")
    headers = read_headers(files)
    auto = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        shell = model_class(auto, folder)(auto)
    blocks = build_quantized_shell(shell, checkpoint, torch.bfloat16)
    verify_tensors(headers, expected_tensors(blocks, checkpoint))
    model = load(folder)
    left = [
        f"layers.{i}.{name}"
        for i, (block, groups) in enumerate(zip(decoder_blocks(model), blocks, strict=True))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and any(name == p.name for g in groups for p in g.linears)
    ]
    if left:
        raise CheckpointError(f"{left[0]} is in floating point, though the configuration does not ignore it")
    return {
        "scheme": checkpoint.scheme,
        "quantized_linears": len(quantized_linears(model)),
        "modalities": [m.value for m in checkpoint.modalities],
        **resident_bytes(model),
    }


def resident_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes in memory: of the quantized linears' packed weights (with scales and bias), of their vectors and patches,
    and of everything else."""
    packed = vectors = compensation = 0
    for module in quantized_linears(model).values():
        for name, tensor in module.named_buffers():
            size = tensor.numel() * tensor.element_size()
            if name == "smooth_scale":
                vectors += size
            elif name.startswith("compensation"):
                compensation += size
            else:
                packed += size
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr() or id(tensor)] = storage.nbytes()
    total = sum(seen.values())
    return {
        "packed": packed,
        "smooth_scale": vectors,
        "compensation": compensation,
        "float": total - packed - vectors - compensation,
    }
