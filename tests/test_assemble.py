"""The demo model's assembly, piece by piece, on made-up tensors: no wheel and no network."""

from __future__ import annotations

import importlib.util
import io
import struct
from types import ModuleType

import numpy as np
import pytest
import torch

from masquant.demo import demo_directory

pytest.importorskip("gguf", reason="needs the demo or dev extra")


@pytest.fixture(scope="module")
def assembly() -> ModuleType:
    spec = importlib.util.spec_from_file_location("assembly", demo_directory() / "assemble.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rope_permutation_is_undone(assembly: ModuleType) -> None:
    """llama.cpp's own conversion, written out row by row: row (head, pair, half) comes from (head, half, pair)."""
    heads, dim, columns = 2, 6, 3
    original = torch.arange(heads * dim * columns, dtype=torch.float32).reshape(heads * dim, columns)
    rows = [
        head * dim + half * dim // 2 + pair for head in range(heads) for pair in range(dim // 2) for half in range(2)
    ]
    assert torch.equal(assembly.undo_rope_permutation(original[rows], heads), original)


def test_low_rank_update_of_stacked_weights(assembly: ModuleType) -> None:
    g = torch.Generator().manual_seed(0)
    weights = {"q": torch.randn(4, 5, generator=g), "k": torch.randn(2, 5, generator=g), "other": torch.zeros(1)}
    a, b = torch.randn(3, 5, generator=g), torch.randn(6, 3, generator=g)
    updated = assembly.add_low_rank(weights, ["q", "k"], a, b)
    assert set(updated) == {"q", "k"}
    torch.testing.assert_close(updated["q"], weights["q"] + b[:4] @ a)
    torch.testing.assert_close(updated["k"], weights["k"] + b[4:] @ a)


def blob(arrays: dict[str, np.ndarray], version: int) -> bytes:
    """A CTranslate2 file with float32 (0) and float16 (4) arrays, written from its description."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    parts = [struct.pack("<I", version), string("WhisperSpec"), struct.pack("<I", 3), struct.pack("<I", len(arrays))]
    for name, array in arrays.items():
        code = {"float32": 0, "float16": 4}[str(array.dtype)]
        parts += [string(name), struct.pack("<B", array.ndim), struct.pack(f"<{array.ndim}I", *array.shape)]
        parts += [struct.pack("<BI", code, array.nbytes), array.tobytes()]
    return b"".join(parts)


def test_reading_ctranslate2(assembly: ModuleType) -> None:
    version = min(assembly.CTRANSLATE2_VERSIONS)
    arrays = {
        "encoder/a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "encoder/b": np.ones((4,), dtype=np.float16),
    }
    found = assembly.read_ctranslate2(io.BytesIO(blob(arrays, version)))
    assert set(found) == set(arrays)
    assert all(np.array_equal(found[n], arrays[n]) and found[n].dtype == arrays[n].dtype for n in arrays)
    with pytest.raises(ValueError, match="bytes early"):
        assembly.read_ctranslate2(io.BytesIO(blob(arrays, version)[:-3]))
    with pytest.raises(ValueError, match="version 99"):
        assembly.read_ctranslate2(io.BytesIO(blob(arrays, 99)))


def test_existing_output_is_refused(assembly: ModuleType, tmp_path: object) -> None:
    with pytest.raises(FileExistsError):
        assembly.assemble(tmp_path, tmp_path)
