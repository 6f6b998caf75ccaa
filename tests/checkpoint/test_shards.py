"""Safetensors files as bytes: headers that lie are refused, merged files hold what their parts held."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from masquant.checkpoint.shards import TensorFile, merge, parts_of, read_header, write_model
from masquant.errors import CheckpointError


def tensors(seed: int, prefix: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}.a": torch.randn(3, 5, generator=g),
        f"{prefix}.b": torch.randn(7, generator=g).to(torch.bfloat16),
        f"{prefix}.c": torch.randint(-8, 8, (5,), generator=g, dtype=torch.int8),
        f"{prefix}.d": torch.zeros(0, 4),
        f"{prefix}.e": torch.tensor(2, dtype=torch.int64),
    }


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for number in range(3):
        save_file(tensors(number, f"layers.{number}"), tmp_path / f"{number}.safetensors")
    return sorted(tmp_path.glob("*.safetensors"))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return set(found) == set(wanted) and all(
        torch.equal(found[n], wanted[n]) and found[n].dtype == wanted[n].dtype for n in wanted
    )


def test_merged_is_what_safetensors_itself_writes(files: list[Path], tmp_path: Path) -> None:
    wanted = {name: tensor for file in files for name, tensor in load_file(file).items()}
    merge(files, tmp_path / "merged")
    assert same(load_file(tmp_path / "merged"), wanted)
    save_file(wanted, tmp_path / "whole", metadata={"format": "pt"})
    assert (tmp_path / "merged").stat().st_size == (tmp_path / "whole").stat().st_size


def test_tensors_are_read_one_by_one(files: list[Path]) -> None:
    file = TensorFile(files[1])
    assert same({name: file.read(name) for name in file.entries}, load_file(files[1]))
    with pytest.raises(CheckpointError, match="holds no nothing"):
        file.read("nothing")


def test_shards_and_their_index(files: list[Path], tmp_path: Path) -> None:
    sizes = [file.stat().st_size for file in files]
    assert parts_of(files, sum(sizes)) == [files]
    assert parts_of(files, sizes[0] + sizes[1]) == [files[:2], files[2:]]
    assert parts_of(files, 1) == [[file] for file in files]
    (tmp_path / "out").mkdir()
    write_model(files, tmp_path / "out", sizes[0] + sizes[1])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found: dict[str, Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        part = load_file(tmp_path / "out" / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(part)
        found |= part
    assert same(found, {name: tensor for file in files for name, tensor in load_file(file).items()})
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())


def test_one_name_in_two_parts_is_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="5 tensors of merged are in two of its parts"):
        merge([files[0], files[0]], tmp_path / "merged")


def lie(file: Path, change: object) -> None:
    """Rewrite the header of a file as `change` says, or its bytes if `change` takes bytes."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["layers.0.a"].update(shape=[3, 6]), r"layers.0.a, F32 \[3, 6\], has 60 bytes"),
        (lambda h: h["layers.0.a"].update(shape=[-3, -5]), r"layers.0.a has shape \[-3, -5\]"),
        (lambda h: h["layers.0.a"].update(data_offsets=[0, 10**15]), "has 1000000000000000 bytes"),
        (lambda h: h["layers.0.a"].update(data_offsets="x"), "is no whole safetensors file"),
        (lambda h: h.pop("layers.0.a"), "begins at byte"),
        (lambda h: h.update(x=5), "is no whole safetensors file"),
        (lambda h: h["layers.0.a"].pop("dtype"), "'dtype'"),
    ],
)
def test_headers_that_lie(files: list[Path], change: object, message: str) -> None:
    lie(files[0], change)
    with pytest.raises(CheckpointError, match=message):
        read_header(files[0])


@pytest.mark.parametrize("size", [0, 4, 8, 60, -1])
def test_cut_files(files: list[Path], size: int) -> None:
    data = files[0].read_bytes()
    files[0].write_bytes(data[:size])
    with pytest.raises(CheckpointError, match="is no whole safetensors file"):
        read_header(files[0])
    files[0].write_bytes(struct.pack("<Q", 2**62) + data[8:])
    with pytest.raises(CheckpointError, match="a header of 4611686018427387904 bytes"):
        read_header(files[0])
