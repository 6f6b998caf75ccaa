"""Killed at any moment, a run goes on to the same bytes, and what it leaves behind is never taken for a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant
from masquant.api import quantize_folder
from masquant.errors import CheckpointError
from masquant.recipe import Recipe

FAMILY = "qwen2_5_omni"
KILLS = 50

# Imports once, then every attempt is a fork of it that is killed. The parent never computes, so that forks are safe.
_PARENT = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import psutil
import torch
torch.set_num_threads(1)
import masquant
from masquant.api import quantize_folder
from masquant.checkpoint.store import partial_folder
from masquant.recipe import Recipe

model, out, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
whole = out.with_name("whole")
samples = masquant.load_samples(model / "data")
recipe = Recipe.preset("quarot", "W4A8", 32)

def attempt(output, seconds=None):
    # Exit code and CPU seconds of a run that is killed after `seconds` of CPU time, however busy the machine is.
    pid = os.fork()
    if pid == 0:
        try:
            quantize_folder(model, output, samples, recipe, batch_size=4, resume=True)
            os._exit(0)
        finally:
            os._exit(1)
    child = psutil.Process(pid)
    while seconds is not None and child.status() != psutil.STATUS_ZOMBIE:
        if sum(child.cpu_times()[:2]) >= seconds:
            child.kill()
            break
        time.sleep(0.003)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime

def loads(folder):
    try:
        masquant.load(folder)
    except masquant.MasquantError:
        return False
    return True

def content(folder):
    report = json.loads((folder / "report.json").read_text())
    del report["stages"]  # seconds
    for part in (report, *report["blocks"]):
        del part["seconds"], part["peak_memory"]
    return {**{f.name: f.read_bytes() for f in folder.iterdir()}, "report.json": report}

code, seconds = attempt(whole)
assert code == 0
wanted = content(whole)
random.seed(0)
counts = {"killed": 0, "finished": 0, "blocks": 0, "loadable": 0}
while counts["killed"] < kills:
    code, _ = attempt(out, random.uniform(0.1, 1.0) * seconds)
    counts["killed"] += code == -signal.SIGKILL
    assert code in (0, -signal.SIGKILL), code
    partial = partial_folder(out)
    if not out.exists():
        counts["blocks"] += len(list(partial.glob("block-*.json")))
        for folder in [partial, *(f for f in partial.glob("*") if f.is_dir())]:
            if loads(folder):  # only the whole checkpoint, killed before it was moved in place
                counts["loadable"] += 1
                assert content(folder) == wanted
    if out.exists():
        counts["finished"] += 1
        assert content(out) == wanted
        shutil.rmtree(out)
        shutil.rmtree(partial, ignore_errors=True)
assert attempt(out)[0] == 0
assert content(out) == wanted and not partial_folder(out).exists()
left = [f.name for f in out.parent.iterdir() if f.name not in ("whole", "out", "model")]
print(json.dumps({**counts, "seconds": seconds, "left": left}))
"""


def world(folder: Path) -> Path:
    """A model folder with calibration data in data/."""
    model = folder / "model"
    tiny_model(FAMILY).to(torch.bfloat16).save_pretrained(model)
    tiny_processor(FAMILY).save_pretrained(model)
    samples = tiny_samples(FAMILY, model / "data", count=5)
    rows = [{k: Path(v).name if k in ("image", "audio") else v for k, v in s.items()} for s in samples]
    (model / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return model


def test_killed_at_fifty_random_moments(tmp_path: Path) -> None:
    model = world(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _PARENT, str(model), str(tmp_path / "out"), str(KILLS)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["killed"] == KILLS and found["blocks"] > 0 and not found["left"]


def test_another_run_is_refused_and_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = world(tmp_path)
    samples = masquant.load_samples(model / "data")
    recipe = Recipe.preset("rtn", "W4A8", 32)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("masquant.api.write_model", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_folder(model, tmp_path / "out", samples, recipe)
    assert (tmp_path / "out.partial" / "block-0001.json").exists() and not (tmp_path / "out").exists()

    def resume(message: str, **changes: object) -> None:
        arguments = {"samples": samples, "recipe": recipe, "resume": True, **changes}
        with pytest.raises(CheckpointError, match=message):
            quantize_folder(model, tmp_path / "out", **arguments)  # type: ignore[arg-type]

    resume(r"recipe.seed \(was 0, is 1\)", recipe=Recipe.preset("rtn", "W4A8", 32, seed=1))
    resume(r"what differs: calibration.text-0001 \(gone\)", samples=[s for s in samples if s.id != "text-0001"])
    resume(r"batch_size \(was 8, is 2\)", batch_size=2)
    resume(r"dtype \(was torch.bfloat16, is torch.float32\)", dtype="float32")
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    resume("what differs: model.model.safetensors;")
    data[-1] ^= 1
    weights.write_bytes(data)
    quantize_folder(model, tmp_path / "out", samples, recipe, resume=True)
    assert not (tmp_path / "out.partial").exists()
