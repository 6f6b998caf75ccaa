# SPDX-License-Identifier: Apache-2.0
"""Output folders: written under a temporary name and renamed, and the finished blocks of an interrupted run.

While a run goes on, `OUT.partial/` holds its fingerprint and, per finished block, a safetensors file and a record,
which is written last: without it the block is not finished. `--resume` continues there if the fingerprint (model,
recipe, calibration, versions) is the same. There is no config.json, so that nothing loads the folder as a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError


def partial_folder(output: Path) -> Path:
    """Where a run towards `output` keeps its finished blocks."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse an output folder that is in the way.

    Raises:
        CheckpointError: it exists and neither `overwrite` nor `resume` was asked for.
    """
    if overwrite and resume:
        raise CheckpointError("--overwrite and --resume exclude each other")
    if output.exists() and not overwrite:
        hint = "it is finished, nothing to resume" if resume else "choose another, or --overwrite"
        raise CheckpointError(f"output folder {output} exists; {hint}")
    if not output.parent.is_dir():
        raise CheckpointError(f"folder {output.parent} of the output does not exist")
    partial = partial_folder(output)
    if partial.exists() and not (overwrite or resume):
        raise CheckpointError(f"{partial} holds an interrupted run; --resume continues it, --overwrite drops it")


@contextmanager
def finished_folder(output: Path, temporary: Path | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block succeeds, and is removed when it fails.

    Args:
        output: what it becomes.
        temporary: its path until then, on the same disk; default beside `output`.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    temporary = temporary or output.with_name(f".{output.name}.writing-{os.getpid()}")
    remove_folder(temporary)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        previous = output.with_name(f".{output.name}.old-{os.getpid()}")
        if output.exists():
            output.rename(previous)
        temporary.rename(output)
        remove_folder(previous)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {output}: {error}; nothing was left behind") from error
    finally:
        remove_folder(temporary)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there: first its config.json, so that what a kill leaves of it loads nowhere."""
    with suppress(OSError):
        (folder / "config.json").unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`; one that a killed run left there is removed."""
    for leftover in output.parent.glob(f".{output.name}.scratch-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.scratch-", dir=output.parent) as folder:
        yield Path(folder)


def write_json(path: Path, value: Any) -> None:
    """JSON under a temporary name, then renamed."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Text under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def digest(parts: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able mapping."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        data = tensor.detach().cpu().contiguous().flatten()
        total.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    return total.hexdigest()


def differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two nested values differ, with both values; digests are too long to be shown."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        keys = [*found, *(key for key in wanted if key not in found)]
        return [
            line
            for key in keys
            for line in differences(found.get(key), wanted.get(key), f"{path}.{key}" if path else str(key))
        ]
    if found == wanted:
        return []
    if any(len(str(value)) > 60 for value in (found, wanted)):
        return [f"{path} (new)" if found is None else f"{path} (gone)" if wanted is None else path]
    return [f"{path} (was {found}, is {wanted})"]


Writer = Callable[[Mapping[str, Tensor], Path], None]


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file of tensors as they are named."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


class BlockStore:
    """Finished blocks of one run on disk."""

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, Any], *, resume: bool, write: Writer = write_tensors
    ) -> None:
        """Open or create the store.

        Args:
            folder: of the store.
            fingerprint: JSON-able, nested; all that determines the blocks.
            resume: keep what is there, if anything is.
            write: how tensors, by their names in the model, become a safetensors file.

        Raises:
            CheckpointError: the finished blocks belong to another run, or the disk is full or not writable.
        """
        self.folder, self._write = folder, write
        self.resumed = resume
        marker = folder / "fingerprint.json"
        wanted = json.loads(json.dumps(fingerprint))
        if resume and marker.exists():
            try:
                found = json.loads(marker.read_text())
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{marker} cannot be read: {error}; drop the run with --overwrite") from error
            different = differences(found, wanted)
            if different:
                more = f" and {len(different) - 5} more" if len(different) > 5 else ""
                raise CheckpointError(
                    f"{folder} belongs to another run; what differs: {', '.join(different[:5])}{more}; do it as then, "
                    "or drop the finished blocks with --overwrite"
                )
            for leftover in folder.iterdir():  # of a run that was killed: spilled hidden states, half a checkpoint
                if leftover.is_dir():
                    remove_folder(leftover)
            return
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(marker, wanted)
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error}") from error

    @property
    def finished(self) -> int:
        """How many blocks are."""
        return len(list(self.folder.glob("block-*.json")))

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors, by name inside the block, and record of a finished block; None if it is not finished.

        Raises:
            CheckpointError: a file was damaged since.
        """
        path = self._path(index)
        marker = path.with_suffix(".json")
        if not marker.exists():
            return None
        prefix = f"layers.{index}."
        try:
            record = json.loads(marker.read_text())
            with safe_open(path, framework="pt") as file:
                tensors = {name.rpartition(prefix)[2]: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete {marker.name} and resume again") from error
        return tensors, record

    def save(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep a finished block, its tensors by name in the model.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        self._keep(self._path(index), tensors)
        try:
            write_json(self._path(index).with_suffix(".json"), record)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.folder}: {error}; free some space and --resume") from error

    def save_part(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors that are in no block, if they are not there yet.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            self._keep(path, tensors)

    def _keep(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write under a temporary name, see it to the disk, rename."""
        temporary = path.with_suffix(".writing")
        try:
            self._write(tensors, temporary)
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write {path}: {error}; free some space and --resume") from error

    def files(self) -> list[Path]:
        """All tensors' files, blocks first."""
        return sorted(self.folder.glob("*.safetensors"))

    def remove(self) -> None:
        """Delete the store."""
        shutil.rmtree(self.folder, ignore_errors=True)
