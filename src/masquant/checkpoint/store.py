# SPDX-License-Identifier: Apache-2.0
"""Output folders: written under a temporary name and renamed, and the finished blocks of an interrupted run.

While a run goes on, `OUT.partial/` holds its fingerprint and one safetensors file per finished block. `--resume`
continues there if the fingerprint (model, recipe, calibration, versions) is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
def finished_folder(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block succeeds, and is removed when it fails.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    temporary = output.with_name(f".{output.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        previous = output.with_name(f".{output.name}.old-{os.getpid()}")
        if output.exists():
            output.rename(previous)
        temporary.rename(output)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {output}: {error}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


class BlockStore:
    """Finished blocks of one run on disk."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        """Open or create the store.

        Raises:
            CheckpointError: there is nothing to resume, or the finished blocks belong to another run.
        """
        self.folder = folder
        marker = folder / "fingerprint.json"
        if resume and marker.exists():
            found = json.loads(marker.read_text())
            differs = [k for k in sorted(set(found) | set(fingerprint)) if found.get(k) != fingerprint.get(k)]
            if differs:
                raise CheckpointError(
                    f"{folder} belongs to another run, {', '.join(differs)} differ; drop it with --overwrite"
                )
            return
        if folder.exists():
            shutil.rmtree(folder)
        try:
            folder.mkdir(parents=True)
            write_json(marker, dict(fingerprint))
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error}") from error

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and record of a finished block, None if it is not finished."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads(file.metadata()["record"])
                return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it and resume again") from error

    def save(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep a finished block.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        path = self._path(index)
        temporary = path.with_suffix(".writing")
        try:
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary, metadata={"record": json.dumps(record)})
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write {path}: {error}; free some space and --resume") from error

    def remove(self) -> None:
        """Delete the store."""
        shutil.rmtree(self.folder, ignore_errors=True)
