"""What `masquant demo` leaves behind, with a tiny model in place of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_processor, tiny_samples

import masquant
from masquant import showcase
from masquant.progress import NoProgress

FAMILY = "qwen2_5_omni"


def test_the_demo_leaves_a_checkpoint_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(FAMILY).save_pretrained(tmp_path / "cache-1234")
    tiny_processor(FAMILY).save_pretrained(tmp_path / "cache-1234")
    for name in ("calibration", "evaluation"):
        rows = tiny_samples(FAMILY, tmp_path / "data" / name, count=4)
        rows = [{k: Path(v).name if k in ("image", "audio") else v for k, v in row.items()} for row in rows]
        (tmp_path / "data" / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(showcase, "obtain_model", lambda on_progress: tmp_path / "cache-1234")
    monkeypatch.setattr(showcase, "demo_directory", lambda: tmp_path)
    monkeypatch.setattr(showcase, "METHODS", ("rtn", "masquant"))
    out = tmp_path / "out"
    showcase.run_demo(
        out, "W4A8", quick=True, overwrite=False, json_file=tmp_path / "demo.json", progress=NoProgress()
    )
    assert masquant.check(out)["scheme"] == "W4A8"
    page, record = (out / "report.html").read_text(), json.loads((out / "report.json").read_text())
    assert list(record["evaluation"]["models"]) == ["float", "rtn", "masquant"] and record["model"] == "omni-135m"
    assert len(record["evaluation"]["examples"]) == 3
    assert "data:audio/flac" in page and "data:image/jpeg" in page and "masquant minus every other method" in page
    card = (out / "README.md").read_text()
    assert "base_model: omni-135m" in card and "| audio | speech | 1 |" in card
    assert json.loads((tmp_path / "demo.json").read_text())["methods"]["rtn"]["samples"]
