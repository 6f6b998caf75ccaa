# SPDX-License-Identifier: Apache-2.0
"""Safetensors files as bytes: their headers, and several merged into one without reading a tensor into memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2}
_ITEM_BYTES |= {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8}
_RANK = {dtype: rank for rank, dtype in enumerate(_ITEM_BYTES)}  # safetensors writes dtypes in the opposite order
_CHUNK = 16 * 2**20
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_header(file: str | Path) -> tuple[dict[str, Any], int]:
    """Entries of a safetensors file by tensor name (`dtype`, `shape`, `data_offsets`), and where its data begins.

    Raises:
        CheckpointError: it is no safetensors file, or not all of one.
    """
    path = Path(file)
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            _check_entry(name, entry, stop - start)
            if start != end:
                raise ValueError(f"{name} begins at byte {start} of the data, not at {end}")
            end = stop
        if 8 + length + end != size:
            raise ValueError(f"its header promises {8 + length + end} bytes, the file has {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path.name} is no whole safetensors file: {error}; copy it again") from error
    return entries, 8 + length


def _check_entry(name: str, entry: Mapping[str, Any], size: int) -> None:
    """Refuse an entry whose shape does not give its number of bytes; other dtypes than these are left alone."""
    count = 1
    for dim in entry["shape"]:
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 0:
            raise ValueError(f"{name} has shape {entry['shape']}")
        count *= dim
    item = _ITEM_BYTES.get(entry["dtype"])
    if item is not None and count * item != size:
        raise ValueError(f"{name}, {entry['dtype']} {entry['shape']}, has {size} bytes")


class TensorFile:
    """A safetensors file whose tensors are read one by one into memory of their own; nothing stays mapped."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: as `read_header`.
        """
        self.path = path
        self.entries, self._begin = read_header(path)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: it is not there, of a dtype that no model has, or cannot be read.
        """
        entry = self.entries.get(name)
        dtype = DTYPES.get(entry["dtype"]) if entry else None
        if entry is None or dtype is None:
            raise CheckpointError(f"{self.path} holds no {name}" if entry is None else f"{name} is {entry['dtype']}")
        start, stop = entry["data_offsets"]
        data = torch.empty(stop - start, dtype=torch.uint8)
        try:
            with open(self.path, "rb") as stream:
                stream.seek(self._begin + start)
                if stream.readinto(data.numpy()) != stop - start:  # type: ignore[arg-type]
                    raise OSError("it is cut off")
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error}") from error
        return data.view(dtype).reshape(entry["shape"])


def merge(files: Sequence[Path], target: Path) -> None:
    """Write the tensors of several files into one, copying bytes.

    Wider dtypes come first, then names, as safetensors itself writes them, so that every tensor stays aligned.

    Raises:
        CheckpointError: a file is none of safetensors, or two have a tensor of one name.
    """
    tensors: list[tuple[str, Mapping[str, Any], Path, int]] = []
    for file in files:
        entries, begin = read_header(file)
        tensors += [(name, entry, file, begin + entry["data_offsets"][0]) for name, entry in entries.items()]
    names = [name for name, *_ in tensors]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{len(names) - len(set(names))} tensors of {target.name} are in two of its parts")
    tensors.sort(key=lambda found: (-_RANK.get(found[1]["dtype"], len(_RANK)), found[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry, _, _ in tensors:
        start, stop = entry["data_offsets"]
        header[name] = {**entry, "data_offsets": [end, end + stop - start]}
        end += stop - start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    opened = {file: open(file, "rb") for file in files}  # noqa: SIM115
    try:
        with open(target, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for _, entry, file, position in tensors:
                start, stop = entry["data_offsets"]
                opened[file].seek(position)
                for left in range(stop - start, 0, -_CHUNK):
                    stream.write(opened[file].read(min(left, _CHUNK)))
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        for source in opened.values():
            source.close()


def parts_of(files: Sequence[Path], limit: int) -> list[list[Path]]:
    """Files in order, collected into parts of at most `limit` bytes (or of one file that is larger)."""
    parts: list[list[Path]] = []
    size = 0
    for file in files:
        more = file.stat().st_size
        if not parts or size + more > limit:
            parts.append([])
            size = 0
        parts[-1].append(file)
        size += more
    return parts


def write_model(files: Sequence[Path], folder: Path, limit: int) -> None:
    """The files' tensors as a model's weights: `model.safetensors`, or shards of up to `limit` bytes and an index."""
    parts = parts_of(files, limit)
    if len(parts) == 1:
        merge(parts[0], folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        merge(part, folder / name)
        for tensor, entry in read_header(folder / name)[0].items():
            weight_map[tensor] = name
            total += entry["data_offsets"][1] - entry["data_offsets"][0]
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
