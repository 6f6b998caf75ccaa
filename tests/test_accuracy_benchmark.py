"""benchmarks/accuracy.py on a tiny model: every table's recipes are valid, rows are kept, the page holds them."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import tiny_model, tiny_processor, tiny_samples

from masquant import Sample

FAMILY = "qwen2_5_omni"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))  # worker processes import it too
    return importlib.import_module("accuracy")


def write_data(folder: Path, seed: int) -> Path:
    samples = tiny_samples(FAMILY, folder, count=8, seed=seed)
    lines = [
        json.dumps({k: str(Path(v).relative_to(folder)) if k in ("image", "audio") else v for k, v in s.items()})
        for s in samples
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    for name in ("model", "calibration", "data"):
        (tmp_path / name).mkdir()
    tiny_model(FAMILY).save_pretrained(tmp_path / "model")
    tiny_processor(FAMILY).save_pretrained(tmp_path / "model")
    return [
        "accuracy.py", "--model", str(tmp_path / "model"),
        "--calibration", str(write_data(tmp_path / "calibration", 0)), "--data", str(write_data(tmp_path / "data", 1)),
        "--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md"),
    ]  # fmt: skip


def test_rows_are_measured_once_and_shown(
    benchmark: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*arguments, "--tables", "activations"])
    benchmark.main()
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert list(rows) == [f"activations/{m}" for m in ("smoothquant", "gptq", "quarot", "masquant")]
    page = (tmp_path / "a.md").read_text()
    assert all(f"| {m} |" in page for m in ("smoothquant", "gptq", "quarot", "masquant")) and "W4A6" in page
    rows["activations/gptq"] |= {"seconds": 12345.0, "machine": "another machine"}
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    benchmark.main()
    page = (tmp_path / "a.md").read_text()
    assert "12345" in page and "gptq: ran on another machine." in page


def test_rows_in_two_processes_on_chosen_samples(
    benchmark: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ["--tables", "robustness", "--rows", "(gptq|quarot), 16", "--processes", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, *only, "--pool", str(tmp_path / "data")])
    benchmark.main()
    record = json.loads((tmp_path / "a.json").read_text())
    assert sorted(record["rows"]) == ["robustness/gptq, 16 samples, seed 0", "robustness/quarot, 16 samples, seed 0"]
    assert all(row["calibration"] == 8 for row in record["rows"].values()) and record["pool"] == 8
    assert "2 rows at a time" in (tmp_path / "a.md").read_text()


def test_samples_are_chosen_evenly_over_tasks(benchmark: ModuleType) -> None:
    pool = [Sample(f"{task}{i}", task, text="x") for task, n in (("a", 9), ("b", 2), ("c", 9)) for i in range(n)]
    chosen = benchmark.choose_samples(pool, 10, 0)
    assert [sum(s.task == t for s in chosen) for t in "abc"] == [4, 2, 4]
    assert chosen == [s for s in pool if s in chosen]
    assert {s.id for s in benchmark.choose_samples(pool, 10, 1)} != {s.id for s in chosen}
    assert benchmark.choose_samples(pool, 0, 1) == pool


def test_spread_over_seeds(benchmark: ModuleType) -> None:
    rows = [
        (f"m, 16 samples, seed {i}", {"tasks": {"t": {"delta_nll": d, "kl": 2 * d}}}) for i, d in enumerate((1, 3))
    ]
    # mean 2, sample deviation sqrt(2); KL twice both
    assert "| m, 16 samples | +2.000 ±1.414 | +2.000 ±1.414 | +4.000 ±2.828 |" in benchmark.spread(rows, ["t"])
    assert benchmark.spread(rows[:1], ["t"]) == []


def test_paired_differences(benchmark: ModuleType) -> None:
    row = {"losses": {"a": [2.0, 0.0, 2], "b": [6.0, 0.0, 2]}}
    other = {"losses": {"a": [1.0, 0.0, 2], "b": [1.0, 0.0, 2]}}
    # differences 1 and 5 over 4 tokens: 1.5 a token; residuals 1 - 3 and 5 - 3: sqrt(8) / 4
    assert benchmark.paired(row, other, {"t": ["a", "b"]}) == ["+1.500 ±0.707"]


def test_recipes_are_compared_over_seeds(benchmark: ModuleType) -> None:
    def row(delta: float, kl: float) -> dict[str, object]:
        return {"tasks": {"speech": {"delta_nll": delta, "kl": kl}}}

    rows = {
        "a, seed 0": row(0.1, 0.2), "a, seed 1": row(0.3, 0.2), "a, seed 2": row(9.0, 9.0),
        "b, seed 0": row(0.2, 0.4), "b, seed 1": row(0.6, 0.4),
    }  # fmt: skip
    page = benchmark.over_seeds(rows, "a", ("b",), ["speech"])
    assert "over 2 seeds" in page[0]  # b has no third
    assert page[-2] == "| b | -0.200 ±0.100 | -0.200 ±0.100 | -0.200 ±0.000 | 50%, 50% |"
    assert benchmark.over_seeds({"a, seed 0": row(0.1, 0.2)}, "a", ("b",), ["speech"]) == []
