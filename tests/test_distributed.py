"""Two processes that share the calibration samples give what one gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant
from masquant import distributed
from masquant.api import quantize_folder
from masquant.recipe import Recipe

FAMILY = "qwen2_5_omni"

_PROCESS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import masquant
from masquant.api import quantize_folder
from masquant.distributed import join, world_size
from masquant.recipe import LearnedArgs, Recipe, SmoothingArgs

join()
assert world_size() == 2
folder = Path(sys.argv[1])
samples = masquant.load_samples(folder / "data")
recipe = Recipe.preset("masquant", "W4A8", 32)
quantize_folder(folder / "model", folder / "two", samples, recipe, batch_size=2)
learned = Recipe.preset("rtn", "W4A8", 32, smoothing=SmoothingArgs("modality", learned=LearnedArgs()))
for samples, recipe, message in ((samples, learned, "run in one process"), (samples[:2], recipe, "too few for 2")):
    try:
        quantize_folder(folder / "model", folder / "never", samples, recipe, batch_size=2, overwrite=True)
    except masquant.MasquantError as error:
        assert message in str(error), error
    else:
        raise SystemExit("not refused")
"""


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
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(tmp_path)],
            env={**os.environ, **common, "RANK": str(number), "LOCAL_RANK": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    samples = masquant.load_samples(tmp_path / "data")
    report = quantize_folder(model, tmp_path / "one", samples, Recipe.preset("masquant", "W4A8", 32), batch_size=2)
    found = json.loads((tmp_path / "two" / "report.json").read_text())
    assert found["calibration"] == report.to_dict()["calibration"]
    for theirs, ours in zip(found["blocks"], report.blocks, strict=True):
        assert theirs["error"] == pytest.approx(ours["error"], rel=1e-5)
        assert [g["choice"] for g in theirs["groups"]] == [g["choice"] for g in ours["groups"]]
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert set(two) == set(one)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-7)


def test_shares_are_contiguous_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for count in (3, 7, 8):
        shares = []
        for number in range(3):
            monkeypatch.setattr(distributed, "rank", lambda number=number: number)
            shares.append(list(distributed.own_range(count)))
        assert [i for share in shares for i in share] == list(range(count)) and all(shares)
