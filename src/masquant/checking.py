# SPDX-License-Identifier: Apache-2.0
"""Is a checkpoint folder whole? Its configuration, headers, every tensor's values one at a time, and checksums."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .checkpoint.format import QUANT_METHOD, CheckpointFormat, parse_format
from .checkpoint.shards import TensorFile, read_header
from .checkpoint.store import write_json
from .errors import CheckpointError
from .integrations.loading import file_digests, load_on_disk
from .integrations.transformers import (
    check_finite,
    check_orthogonal,
    check_tensor,
    encoder_modules,
    quantized_linears,
)
from .models import decoder_blocks, family_of
from .plan import is_ignored, linear_names, plan_encoders
from .progress import NoProgress
from .runtime import MasquantLinear
from .runtime.head import MasquantHead
from .runtime.outer import OuterLinear
from .runtime.transforms import LEARNED_ROTATION

CHECKSUMS = "checksums.json"
INDEX = "model.safetensors.index.json"
_REWRITTEN = {CHECKSUMS, "README.md", "report.json", "report.html"}  # `masquant report` adds to them


def check(path: str | Path) -> dict[str, Any]:
    """Is a checkpoint folder whole and loadable, and is nothing in floating point that should be low-bit?

    The configuration and the safetensors headers are compared without reading weights; then every tensor is read, one
    at a time, and its values are checked. The model is never in memory as a whole.

    Returns:
        What was found: scheme, numbers of linears, bytes.

    Raises:
        CheckpointError: naming the first thing that is wrong.
        ModelError: its config.json describes no model that transformers or masquant knows.
    """
    folder = Path(path)
    checkpoint = read_format(folder)
    check_index(folder)
    with tempfile.TemporaryDirectory() as converted:
        model, places = load_on_disk(folder, Path(converted))
        check_values(model, places)
    check_low_bit(model, checkpoint)
    verify_checksums(folder)
    return {
        "scheme": checkpoint.scheme,
        "quantized_linears": len(quantized_linears(model)),
        "encoder_linears": len(encoder_modules(model)),
        "modalities": [m.value for m in checkpoint.modalities],
        **resident_bytes(model),
    }


def read_config_file(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        CheckpointError: it cannot be read, or holds no JSON object.
    """
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return found


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder holds a masquant checkpoint, whole or not."""
    try:
        found = read_config_file(Path(path)).get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD


def read_format(folder: Path) -> CheckpointFormat:
    """The quantization_config of a folder.

    Raises:
        CheckpointError: there is none of masquant, or it is malformed.
    """
    found = read_config_file(folder).get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{folder} is no masquant checkpoint: config.json has no masquant quantization_config")
    return parse_format(found)


def check_index(folder: Path) -> None:
    """Check that the safetensors files are whole, and that the index of several names what they hold.

    Raises:
        CheckpointError: there are no files, or the index and the files differ.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files")
    held = {name: file.name for file in files for name in read_header(file)[0]}
    index = folder / INDEX
    if not index.exists():
        if [file.name for file in files] != ["model.safetensors"]:
            raise CheckpointError(f"{folder} has {files[0].name} but no {INDEX}; copy it whole")
        return
    try:
        named = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}; copy it again") from error
    lacking = [shard for shard in named.values() if shard not in [file.name for file in files]]
    if lacking:
        raise CheckpointError(f"{folder} lacks the shard {lacking[0]}, which {INDEX} names; copy it whole")
    different = [name for name in {**held, **named} if held.get(name) != named.get(name)]
    if different:
        name = different[0]
        raise CheckpointError(
            f"{index} says that {name} is in {named.get(name, 'no file')}, it is in {held.get(name, 'none')}; copy it "
            "again"
        )


def check_values(model: PreTrainedModel, places: Mapping[str, tuple[Path, str]]) -> None:
    """Check the values of a checkpoint's tensors, reading one at a time.

    Args:
        model: on the meta device.
        places: per tensor of it, file and name there.

    Raises:
        CheckpointError: as `check_tensor`; or NaN or infinity in any other parameter.
    """
    opened = {file: TensorFile(file) for file in {file for file, _ in places.values()}}
    parameters = {name for name, _ in model.named_parameters()}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, MasquantLinear)}
    for name, (file, stored) in sorted(places.items(), key=lambda place: place[1]):
        owner = next((o for o in owners(name) if o in linears), None)
        tensor = opened[file].read(stored)
        if owner is not None:
            check_tensor(stored, name.removeprefix(f"{owner}."), tensor, linears[owner])
        elif name.rpartition(".")[2] == LEARNED_ROTATION:
            check_orthogonal(tensor)
        elif name in parameters:
            check_finite(stored, tensor)
        elif bool(tensor.isnan().any()):  # infinity in a buffer may be the model's own, such as a bound that is none
            raise CheckpointError(f"{stored} holds values that are none")
        del tensor


def owners(name: str) -> list[str]:
    """Names of the modules that a tensor may belong to: "a.b" and "a" of "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def check_low_bit(model: PreTrainedModel, checkpoint: CheckpointFormat) -> None:
    """Check that every linear that the configuration does not ignore is a quantized one.

    Raises:
        CheckpointError: naming one in floating point.
    """
    modules = {f"layers.{i}.{n}": m for i, b in enumerate(decoder_blocks(model)) for n, m in b.named_modules()}
    for name in linear_names(family_of(model.config), decoder_blocks(model)):
        if not is_ignored(name, checkpoint.ignore) and not isinstance(modules.get(name), MasquantLinear):
            raise CheckpointError(f"{name} is in floating point, though the configuration does not ignore it")
    left = plan_encoders(model, family_of(model.config), checkpoint.encoders, checkpoint.ignore)
    if left:
        raise CheckpointError(f"{left[0].linear.name} is in floating point, though its encoder is not ignored")


def write_checksums(folder: Path, config: Path | None = None) -> None:
    """SHA-256 of a checkpoint's files, but for those that `masquant report` adds to; `config`: config.json if it is
    still elsewhere."""
    files = [file for file in folder.iterdir() if file.is_file() and file.name not in _REWRITTEN]
    files += [] if config is None else [config]
    write_json(folder / CHECKSUMS, file_digests(sorted(files, key=lambda file: file.name), NoProgress()))


def verify_checksums(folder: Path) -> None:
    """Compare a checkpoint's files with its checksums, if it has them (`model.save_pretrained` alone writes none).

    Raises:
        CheckpointError: a file is missing, or was changed since.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return
    try:
        wanted = dict(json.loads(path.read_text(encoding="utf-8")))
        outside = [name for name in wanted if Path(name).name != name]
        if outside:
            raise ValueError(f"it names {outside[0]!r}, which is no file of the folder")
        found = file_digests([folder / name for name in wanted], NoProgress())
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be compared: {error}; copy the checkpoint whole") from error
    lacking = {"config.json", *(file.name for file in folder.glob("*.safetensors"))} - set(wanted)
    if lacking:
        raise CheckpointError(f"{path} does not list {sorted(lacking)[0]}; copy the checkpoint whole")
    changed = [name for name in wanted if found[name] != wanted[name]]
    if changed:
        raise CheckpointError(
            f"{folder / changed[0]} was changed since it was written (its checksum in {CHECKSUMS} differs); copy it "
            f"again, or delete {CHECKSUMS} if you changed it on purpose"
        )


def resident_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes in memory: of the quantized linears' packed weights (with scales and bias), of their vectors and patches,
    of 8-bit embeddings and head, of encoders' 8-bit linears, and of everything else."""
    sizes = dict.fromkeys(("packed", "smooth_scale", "compensation", "lm_head", "encoders"), 0)
    hidden: dict[int, int] = {}  # what the kernels hold is in no buffer
    for module in model.modules():
        if not isinstance(module, MasquantLinear):
            continue
        outer = (
            "lm_head" if isinstance(module, MasquantHead) else "encoders" if isinstance(module, OuterLinear) else ""
        )
        for name, tensor in module.named_buffers():
            size = tensor.numel() * tensor.element_size()
            kind = name if name == "smooth_scale" else "compensation" if name.startswith("compensation") else "packed"
            sizes[outer or kind] += size
        packed = module.group.packed
        if packed is not None and module.is_leader:
            patches = sum(patch.nbytes for patch in packed.patches.values())
            hidden[id(packed)] = packed.weight_bytes + patches
            sizes[outer or "packed"] += packed.weight_bytes
            sizes["compensation"] += patches
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr() or id(tensor)] = storage.nbytes()
    total = sum(seen.values()) + sum(hidden.values())
    return {**sizes, "float": total - sum(sizes.values())}
