"""The benchmark of estimates runs, and its table and file say what was expected and what was taken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny_models import tiny_model, tiny_processor, tiny_samples

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/estimate.py"


def test_expected_and_taken(tmp_path: Path) -> None:
    family = "qwen2_5_vl"
    tiny_model(family).save_pretrained(tmp_path / "model")
    tiny_processor(family).save_pretrained(tmp_path / "model")
    rows = tiny_samples(family, tmp_path / "data", count=8)
    rows = [{k: Path(v).name if k == "image" else v for k, v in row.items()} for row in rows]
    (tmp_path / "data/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        sys.executable, str(SCRIPT), "--model", str(tmp_path / "model"), "--calibration", str(tmp_path / "data"),
        "--methods", "rtn", "--group-size", "32", "--stages", "--json", str(tmp_path / "found.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "found.json").read_text())
    expected, taken = row["expected"], row["taken"]
    assert 0.2 < expected["seconds"] / taken["seconds"] < 5
    assert abs(expected["peak_memory"] / taken["peak_memory"] - 1) < 0.25
    assert "s expected" in done.stdout and "blocks" in done.stdout
