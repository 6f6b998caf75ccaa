# SPDX-License-Identifier: Apache-2.0
"""Loading float and quantized models through transformers: whole, without weights, or with the blocks left on disk."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from ..blocks import AbstractBlocks
from ..checkpoint.shards import TensorFile
from ..checkpoint.store import BlockStore
from ..errors import CheckpointError, ModelError
from ..models import FAMILIES, decoder_blocks, decoder_of, linearize
from ..progress import AbstractProgress

MOST_LAYERS = 1000
ADAPTER = "adapter_config.json"
_HASHED_BYTES = 16 * 2**20


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_config(path: str | Path) -> Any:
    """The model config of a folder or hub id.

    Raises:
        ModelError: there is none that transformers reads.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a malformed config makes transformers raise nearly anything
        raise ModelError(f"cannot read a model config from {path}: {first_line(error)}") from error


def model_class(config: Any, path: str | Path) -> type[PreTrainedModel]:
    """The transformers class that a config asks for.

    Raises:
        ModelError: transformers has no such class.
    """
    names = config.architectures if isinstance(config.architectures, list | tuple) else ()
    for name in names:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ModelError(
        f"{path}: transformers {transformers.__version__} has no class for architectures {config.architectures}"
    )


def meta_model(path: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """The model on the meta device: shapes without weights.

    Raises:
        ModelError: its config is broken.
    """
    config = read_config(path)
    chosen = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    _check_depth(config.to_dict(), path)
    try:
        with torch.device("meta"):
            return model_class(config, path)._from_config(config, dtype=chosen or torch.float32)
    except ModelError:
        raise
    except Exception as error:  # sizes that do not fit together fail anywhere
        raise ModelError(f"{path}: its config.json describes no working model: {first_line(error)}") from error


def _check_depth(config: Mapping[str, Any], path: str | Path) -> None:
    """Refuse numbers of layers that no model has: building it would take for ever, on the meta device too."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_depth(value, path)
        elif str(key).endswith(("layers", "depth", "experts")) and isinstance(value, int) and value > MOST_LAYERS:
            raise ModelError(f"{path}: its config.json says {key} = {value}; at most {MOST_LAYERS} are supported")


def _check_size(path: str | Path, shell: nn.Module) -> None:
    """Refuse a folder whose files hold far fewer numbers than the config promises, before memory is taken for them."""
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    promised = sum(tensor.numel() for tensor in shell.state_dict().values())
    held = sum(file.stat().st_size for file in files)  # a number takes half a byte at least
    if files and promised > 8 * held + 10**6:
        raise CheckpointError(f"{path}: its config.json promises {promised} numbers, its files have {held} bytes")


def load_any(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model by the class that its config names; nothing may be missing, left over or of another shape.

    Raises:
        ModelError: transformers cannot load it.
        CheckpointError: its tensors do not fit.
    """
    config = read_config(path)
    chosen = model_class(config, path)
    if (Path(path) / ADAPTER).is_file():  # transformers would load it on the way, pickled or not
        raise ModelError(f"{path} has an adapter ({ADAPTER}), which is not read; merge it into the weights first")
    _check_size(path, meta_model(path))
    options = {"dtype": "auto", "use_safetensors": True, **kwargs}
    try:
        model, info = _from_pretrained(chosen, path, options)
    except (CheckpointError, ModelError):
        raise
    except Exception as error:  # broken files make loaders raise nearly any exception
        raise CheckpointError(f"cannot load {path}: {first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            first = sorted(map(str, info[problem]))[0]
            raise CheckpointError(f"{path}: {len(info[problem])} {problem.replace('_', ' ')}, such as {first}")
    return model.eval()


def _from_pretrained(
    cls: type[PreTrainedModel], path: str | Path, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of loading it."""
    loader = PreTrainedModel.from_pretrained.__func__  # a class's own may not say it
    model, info = loader(cls, path, output_loading_info=True, **options)
    found = next((f.side_file for f in FAMILIES if model.config.model_type in f.model_types), None)
    if found is not None:
        method, name = found
        getattr(model, method)(cached_file(path, name))
    return model, info


def _devices(model: nn.Module, layers: nn.Module, device: str) -> dict[str, str]:
    """Device map with every decoder block on disk and all else on `device`."""
    found: dict[str, str] = {}

    def walk(module: nn.Module, name: str) -> None:
        if module is layers:
            found.update({f"{name}.{index}": "disk" for index, _ in enumerate(layers.children())})
        elif any(child is layers for child in module.modules()):
            for child_name, child in module.named_children():
                walk(child, f"{name}.{child_name}".removeprefix("."))
            for tensor_name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                found[f"{name}.{tensor_name}".removeprefix(".")] = device
        else:
            found[name] = device

    walk(model, "")
    return found


class StreamedBlocks(AbstractBlocks):
    """Blocks read from safetensors files when they are wanted, and written to a store when they are done.

    The model's own blocks stay on the meta device; all else is in memory until the blocks begin.
    """

    def __init__(self, model: PreTrainedModel, places: Mapping[str, tuple[Path, str]]) -> None:
        """Take a model whose blocks are on the meta device.

        Args:
            model: as said.
            places: per tensor of the blocks, by its name in the model, file and name there.

        Raises:
            CheckpointError: a tensor of a block is nowhere, or has another shape.
        """
        super().__init__(model)
        self.places = places
        self.store: BlockStore | None = None
        self._opened = {file: TensorFile(file) for file in self.files}
        for index, block in enumerate(decoder_blocks(model)):
            for name, tensor in block.state_dict().items():
                full = self.prefix(index) + name
                if full not in places:
                    raise CheckpointError(f"{model.name_or_path}: the tensor {full} is missing")
                file, stored = places[full]
                _check_shape(self._opened[file], stored, tensor)

    @property
    def files(self) -> list[Path]:
        """The safetensors files that hold the blocks."""
        return sorted({file for file, _ in self.places.values()})

    def copy(self, index: int) -> nn.Module:
        block = deepcopy(decoder_blocks(self.model)[index])
        tensors: dict[str, Tensor] = {}
        for name, tensor in block.state_dict().items():
            file, stored = self.places[self.prefix(index) + name]
            tensors[name] = self._opened[file].read(stored).to(tensor.dtype)
        block.load_state_dict(tensors, assign=True)
        return linearize(block, self.family)

    def take(self, index: int) -> nn.Module:
        return self.copy(index)

    def finish(self, block: nn.Module) -> None:
        block.to("meta")

    def leave_rest(self) -> None:
        """Write what is in no block to the store, and give its memory back."""
        if self.store is not None:
            state = self.model.state_dict()
            inside = tuple(self.prefix(index) for index in range(len(self)))
            rest = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
            self.store.save_part("rest", rest)
        self.model.to("meta")

    def add(self, name: str, tensor: Tensor) -> None:
        if self.store is not None:
            self.store.save_part(name, {self.prefix(0).removesuffix("layers.0.") + name: tensor})


def load_streamed(path: str | Path, *, dtype: str, device: torch.device, folder: Path | None = None) -> StreamedBlocks:
    """A model with its decoder blocks left on disk.

    Args:
        path: folder or hub id.
        dtype: as from_pretrained takes it.
        device: where encoders, embeddings and head go.
        folder: for blocks that transformers stores in another form than its modules have.

    Raises:
        ModelError: transformers cannot load it.
        CheckpointError: its tensors do not fit.
    """
    shell = meta_model(path)
    layers = decoder_of(shell).layers
    assert isinstance(layers, nn.ModuleList)
    return StreamedBlocks(*_load_offloaded(path, _devices(shell, layers, str(device)), folder, dtype=dtype))


def load_on_disk(path: str | Path, folder: Path) -> tuple[PreTrainedModel, dict[str, tuple[Path, str]]]:
    """A model on the meta device whose files are found to hold all of it, without reading a tensor.

    Args:
        path: folder or hub id.
        folder: for what transformers stores in another form than its modules have.

    Returns:
        The model, and per tensor of it that is stored as it is: file and name there.

    Raises:
        ModelError: transformers cannot load it.
        CheckpointError: its tensors do not fit.
    """
    model, places = _load_offloaded(path, {"": "disk"}, folder, dtype="auto", offload_buffers=True)
    opened = {file: TensorFile(file) for file in {file for file, _ in places.values()}}
    for name, tensor in model.state_dict().items():
        if name in places:
            file, stored = places[name]
            _check_shape(opened[file], stored, tensor)
    return model, places


def _check_shape(file: TensorFile, stored: str, tensor: Tensor) -> None:
    shape = file.entries[stored]["shape"]
    if list(tensor.shape) != shape:
        raise CheckpointError(f"{file.path}: {stored} has shape {shape}, the model needs {list(tensor.shape)}")


def _load_offloaded(
    path: str | Path, devices: Mapping[str, str], folder: Path | None, **options: Any
) -> tuple[PreTrainedModel, dict[str, tuple[Path, str]]]:
    """A model of which some parts are on "disk", and where the tensors of those lie: file and name there."""
    said = logging.getLogger("accelerate.big_modeling")
    level = said.level
    offload = None if folder is None else str(folder)
    try:
        with warnings.catch_warnings():
            said.setLevel(logging.ERROR)  # that parameters are on the meta device is what is wanted
            warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
            model = load_any(path, device_map=dict(devices), offload_folder=offload, **options)
    finally:
        said.setLevel(level)
    places: dict[str, tuple[Path, str]] = {}
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            loader = getattr(weights, "dataset", weights)
            for name, entry in loader.index.items():
                if "safetensors_file" in entry:
                    places[name] = (Path(entry["safetensors_file"]), entry.get("weight_name", name))
    remove_hook_from_submodules(model)
    del model.hf_device_map
    return model, places


def write_part(model: PreTrainedModel, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Some of a model's tensors as a safetensors file, under the names that transformers gives them on disk."""
    with tempfile.TemporaryDirectory(prefix="part-", dir=path.parent) as folder:
        model.save_pretrained(folder, state_dict=dict(tensors), max_shard_size=2**60)
        (Path(folder) / "model.safetensors").replace(path)


def part_writer(model: PreTrainedModel) -> Callable[[Mapping[str, Tensor], Path], None]:
    """`write_part` of a model."""
    return partial(write_part, model)


def file_digests(files: list[Path], progress: AbstractProgress) -> dict[str, str]:
    """SHA-256 of files' contents by their names."""
    total = sum(file.stat().st_size for file in files)
    sums = {file.name: hashlib.sha256() for file in files}

    def chunks() -> Any:
        for file in files:
            with open(file, "rb") as stream:
                while data := stream.read(_HASHED_BYTES):
                    yield file.name, data

    for name, data in progress.track(chunks(), "reading the model's files", -(-total // _HASHED_BYTES), "x 16 MiB"):
        sums[name].update(data)
    return {name: found.hexdigest() for name, found in sums.items()}
