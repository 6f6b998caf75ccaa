"""benchmarks/accuracy.py on a tiny model: every table's recipes are valid, rows are kept, the page holds them."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import tiny_model, tiny_processor, tiny_samples

FAMILY = "qwen2_5_omni"


def load_benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks/accuracy.py"
    spec = importlib.util.spec_from_file_location("accuracy_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_data(folder: Path, seed: int) -> Path:
    samples = tiny_samples(FAMILY, folder, count=8, seed=seed)
    lines = [
        json.dumps({k: str(Path(v).relative_to(folder)) if k in ("image", "audio") else v for k, v in s.items()})
        for s in samples
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_rows_are_measured_once_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_benchmark()
    for name in ("model", "calibration", "data"):
        (tmp_path / name).mkdir()
    tiny_model(FAMILY).save_pretrained(tmp_path / "model")
    tiny_processor(FAMILY).save_pretrained(tmp_path / "model")
    arguments = [
        "accuracy.py", "--tables", "activations", "--model", str(tmp_path / "model"),
        "--calibration", str(write_data(tmp_path / "calibration", 0)), "--data", str(write_data(tmp_path / "data", 1)),
        "--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert list(rows) == [f"activations/{m}" for m in ("smoothquant", "gptq", "quarot", "masquant")]
    page = (tmp_path / "a.md").read_text()
    assert all(f"| {m} |" in page for m in ("smoothquant", "gptq", "quarot", "masquant")) and "W4A6" in page
    rows["activations/gptq"]["seconds"] = 12345.0
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    benchmark.main()
    assert "12345" in (tmp_path / "a.md").read_text()


def test_paired_differences() -> None:
    row = {"losses": {"a": [2.0, 0.0, 2], "b": [6.0, 0.0, 2]}}
    other = {"losses": {"a": [1.0, 0.0, 2], "b": [1.0, 0.0, 2]}}
    # differences 1 and 5 over 4 tokens: 1.5 a token; residuals 1 - 3 and 5 - 3: sqrt(8) / 4
    assert load_benchmark().paired(row, other, {"t": ["a", "b"]}) == ["+1.500 ±0.707"]
