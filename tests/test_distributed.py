"""Two processes that share the calibration samples give what one gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant
from masquant import distributed
from masquant.api import quantize_folder
from masquant.distributed import join
from masquant.progress import NoProgress
from masquant.recipe import LearnedArgs, Recipe, RefinementArgs, SmoothingArgs

FAMILY = "qwen2_5_omni"

RECIPES = {
    "masquant": Recipe.preset("masquant", "W4A8", 32),
    "learned": Recipe.preset(
        "rtn", "W4A8", 32, smoothing=SmoothingArgs("modality", learned=LearnedArgs(steps=12, batches_per_step=2))
    ),
    "refined": Recipe.preset("gptq", "W4A8", 32, refinement=RefinementArgs(steps=6)),
}


class StopsAt(NoProgress):
    """Interrupts before a block."""

    def __init__(self, block: int) -> None:
        self.block = block

    def track(self, items: Iterable[Any], what: str, total: int, unit: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if what == "quantizing" and number == self.block:
                raise KeyboardInterrupt
            yield item


def share(folder: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    join()
    assert distributed.world_size() == 2
    samples = masquant.load_samples(folder / "data")
    for name, recipe in RECIPES.items():
        quantize_folder(folder / "model", folder / f"two-{name}", samples, recipe, batch_size=2)
    with pytest.raises(masquant.MasquantError, match="too few for 2"):
        quantize_folder(folder / "model", folder / "never", samples[:2], recipe, batch_size=2)
    arguments: Any = (folder / "model", folder / "two-resumed", samples, RECIPES["masquant"])
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(*arguments, batch_size=2, progress=StopsAt(1))
    quantize_folder(*arguments, batch_size=2, resume=True)


def same_tensors(found: Path, wanted: Path, *, rtol: float, atol: float) -> None:
    two, one = (load_file(folder / "model.safetensors") for folder in (found, wanted))
    assert set(two) == set(one)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=rtol, atol=atol)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model(FAMILY).save_pretrained(model)
    tiny_processor(FAMILY).save_pretrained(model)
    rows = tiny_samples(FAMILY, tmp_path / "data", count=10)
    rows = [{k: Path(v).name if k in ("image", "audio") else v for k, v in row.items()} for row in rows]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    program = "import sys, test_distributed, pathlib; test_distributed.share(pathlib.Path(sys.argv[1]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            env={**os.environ, **common, "PYTHONPATH": paths, "RANK": str(number), "LOCAL_RANK": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    samples = masquant.load_samples(tmp_path / "data")
    for name, recipe in RECIPES.items():
        report = quantize_folder(model, tmp_path / name, samples, recipe, batch_size=2)
        found = json.loads((tmp_path / f"two-{name}" / "report.json").read_text())
        assert found["calibration"] == report.to_dict()["calibration"]
        for theirs, ours in zip(found["blocks"], report.blocks, strict=True):
            assert theirs["error"] == pytest.approx(ours["error"], rel=1e-5)
            if name == "learned":
                assert theirs["learned"] == pytest.approx(ours["learned"], rel=1e-5)
                assert ours["learned"]["after"] < ours["learned"]["before"]
            for their, our in zip(theirs["groups"], ours["groups"], strict=True):
                assert their["choice"] == our["choice"]
                assert their["plain_errors"] == pytest.approx(our["plain_errors"], rel=1e-4)
                for state in ("before", "after"):
                    for modality, channels in our["ranges"][state]["channels"].items():
                        assert their["ranges"][state]["channels"][modality] == pytest.approx(channels, rel=1e-4)
        same_tensors(tmp_path / f"two-{name}", tmp_path / name, rtol=1e-5, atol=1e-7)
    same_tensors(tmp_path / "two-resumed", tmp_path / "two-masquant", rtol=0, atol=0)


def test_shares_are_contiguous_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for count in (3, 7, 8):
        shares = []
        for number in range(3):
            monkeypatch.setattr(distributed, "rank", lambda number=number: number)
            shares.append(list(distributed.own_range(count)))
        assert [i for share in shares for i in share] == list(range(count)) and all(shares)
