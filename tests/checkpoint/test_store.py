"""Folders: whole or not at all, and nothing in the way is touched."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from masquant.checkpoint import store
from masquant.checkpoint.store import BlockStore, check_output, finished_folder, partial_folder, tensor_digest
from masquant.errors import CheckpointError


def test_finished_folder_appears_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with finished_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    with finished_folder(out) as folder:
        (folder / "b").write_text("2")
    assert [f.name for f in out.iterdir()] == ["b"]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def fail(file: Path, error: BaseException) -> None:
    file.write_text("1")
    raise error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_nothing_is_left_after_a_failure(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("kept")
    wanted = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted), finished_folder(out) as folder:
        fail(folder / "half", error)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert (out / "old").read_text() == "kept"


def test_full_disk_while_a_block_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BlockStore(tmp_path / "work", {"a": 1}, resume=False)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left .* free some space and --resume"):
        blocks.save(0, {"w": torch.ones(2)}, {})
    assert blocks.load(0) is None


def test_blocks_round_trip(tmp_path: Path) -> None:
    blocks = BlockStore(tmp_path / "work", {"a": 1}, resume=False)
    blocks.save(3, {"w": torch.arange(4.0)}, {"block": 3})
    again = BlockStore(tmp_path / "work", {"a": 1}, resume=True)
    found = again.load(3)
    assert found is not None
    assert torch.equal(found[0]["w"], torch.arange(4.0)) and found[1] == {"block": 3}
    assert again.load(2) is None
    with pytest.raises(CheckpointError, match=r"what differs: a \(was 1, is 2\), b \(was None, is 1\)"):
        BlockStore(tmp_path / "work", {"a": 2, "b": 1}, resume=True)
    fresh = BlockStore(tmp_path / "work", {"a": 1}, resume=False)
    assert fresh.load(3) is None
    fresh.remove()
    assert not (tmp_path / "work").exists()


def test_output_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_output(out, overwrite=False, resume=False)
    partial_folder(out).mkdir()
    with pytest.raises(CheckpointError, match="holds an interrupted run; --resume continues"):
        check_output(out, overwrite=False, resume=False)
    check_output(out, overwrite=False, resume=True)
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists; choose another, or --overwrite"):
        check_output(out, overwrite=False, resume=False)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        check_output(out, overwrite=False, resume=True)
    check_output(out, overwrite=True, resume=False)
    with pytest.raises(CheckpointError, match="exclude each other"):
        check_output(out, overwrite=True, resume=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        check_output(tmp_path / "no" / "out", overwrite=False, resume=False)


def test_digest_sees_names_shapes_dtypes_and_bytes() -> None:
    base = {"a": torch.arange(4, dtype=torch.bfloat16)}
    variants = [
        {"b": base["a"]},
        {"a": base["a"].view(2, 2)},
        {"a": base["a"].float()},
        {"a": base["a"] + 1},
        {"a": torch.tensor(1.0)},
        {},
    ]
    digests = {tensor_digest(v) for v in [base, *variants]}
    assert len(digests) == len(variants) + 1
    assert tensor_digest(base) == tensor_digest({"a": base["a"].clone()})
