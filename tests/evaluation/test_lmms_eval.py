"""The bridge to lmms-eval: the program itself on tasks over local data gives what `evaluate` gives."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant
from masquant.api import load_any
from masquant.calibration.dataset import load_samples
from masquant.compare import load_processor
from masquant.evaluation import evaluate

FAMILY = "qwen2_5_omni"

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_visual: !function media.visuals
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}}
"""
_MEDIA = """\
from pathlib import Path

import soundfile
from PIL import Image

FOLDER = Path({folder!r})


def visuals(doc):
    found = []
    if doc.get("image"):
        found.append(Image.open(FOLDER / doc["image"]).convert("RGB"))
    if doc.get("audio"):
        array, rate = soundfile.read(FOLDER / doc["audio"])
        found.append({{"array": array, "sampling_rate": rate}})
    return found
"""


def write_tasks(folder: Path, data: Path, tasks: tuple[str, ...]) -> None:
    """Task files for lmms-eval over a folder with metadata.jsonl, one task each."""
    folder.mkdir()
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    (folder / "media.py").write_text(_MEDIA.format(folder=str(data)))
    for name in tasks:
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows if row["task"] == name))
        (folder / f"{name}.yaml").write_text(_TASK.format(name=f"local_{name}", file=file))


def run_lmms_eval(
    model: Path, tasks: Path, names: tuple[str, ...], output: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Results per task, and every answer by the document's id."""
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", "--model", "masquant", "--model_args", f"pretrained={model}",
         "--tasks", ",".join(f"local_{name}" for name in names), "--include_path", str(tasks), "--device", "cpu",
         "--batch_size", "1", "--log_samples", "--output_path", str(output)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(output / "hf")},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    files = list(output.rglob("*_results.json"))  # it exits with 0 even after an error
    assert done.returncode == 0 and files, done.stderr[-3000:]
    results = json.loads(files[0].read_text())["results"]
    answers: dict[str, str] = {}
    for name in names:
        ids = [json.loads(line)["id"] for line in (tasks / f"{name}.jsonl").read_text().splitlines()]
        for line in next(output.rglob(f"*_samples_local_{name}.jsonl")).read_text().splitlines():
            row = json.loads(line)
            answers[ids[row["doc_id"]]] = row["filtered_resps"]
    return results, answers


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_lmms_eval_scores_as_evaluate_does(tmp_path: Path) -> None:
    """A quantized model that answers with noise: every single answer must agree, not only the score."""
    data, out = tmp_path / "data", tmp_path / "out"
    rows = tiny_samples(FAMILY, data, count=8)
    rows = [{k: Path(v).name if k in ("image", "audio") else v for k, v in row.items()} for row in rows]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, processor = tiny_model(FAMILY), tiny_processor(FAMILY)
    report = masquant.quantize(model, processor, data, recipe=masquant.Recipe.preset("rtn", "W4A8", 32))
    masquant.save(model, processor, out, report)
    names = ("picture", "speech", "spoken-question")
    write_tasks(tmp_path / "tasks", data, names)
    results, answers = run_lmms_eval(out, tmp_path / "tasks", names, tmp_path / "logs")
    found = evaluate(
        load_any(out), load_processor(out), load_samples(data), tasks=names, batch_size=1, max_new_tokens=8
    )
    assert answers == {s.id: s.prediction for s in found.samples} and len(set(answers.values())) > 1
    for name in ("picture", "spoken-question"):
        assert results[f"local_{name}"]["exact_match,none"] == found.tasks[name]["exact_match"]
