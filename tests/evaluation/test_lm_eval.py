"""lm-eval on a quantized model, by the documentation's own lines."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant

FAMILY = "qwen2_5_omni"
PAGE = Path(__file__).parent.parent.parent / "docs" / "benchmarks.md"
_TASK = """\
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_measures_the_models_likelihoods(tmp_path: Path) -> None:
    """Bits per byte of texts are those of the model's own logits."""
    model, processor = tiny_model(FAMILY), tiny_processor(FAMILY)
    samples = tiny_samples(FAMILY, tmp_path / "data", count=8)
    report = masquant.quantize(model, processor, samples, recipe=masquant.Recipe.preset("rtn", "W4A8", 32))
    masquant.save(model, processor, tmp_path / "out", report)
    texts = sorted({s["text"] for s in samples if "text" in s})
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "text.yaml").write_text(_TASK)
    found = re.search(r"```lm-eval\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    lines, count = re.subn(
        r"tasks=\[.*?\]",
        'tasks=["local_text"], task_manager=lm_eval.tasks.TaskManager(include_path=".")',
        found[1],
    )
    assert count == 1
    lines += "import json\nprint('\\n' + json.dumps(results['results']['local_text']['bits_per_byte,none']))\n"
    done = subprocess.run(
        [sys.executable, "-c", lines],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = float(done.stdout.strip().splitlines()[-1])
    tokenizer, total = processor.tokenizer, 0.0
    loaded = masquant.load(tmp_path / "out")
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            scores = torch.log_softmax(loaded(input_ids=ids).logits[0, :-1].float(), -1)
        total += float(scores.gather(1, ids[0, 1:, None]).sum())
    size = sum(len(text.encode()) for text in texts)
    assert measured == pytest.approx(-total / size / math.log(2), rel=1e-4)
