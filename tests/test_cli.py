"""The command line as a user meets it, on a tiny model's folder: exit codes, messages, JSON, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_models import tiny_model, tiny_processor, tiny_samples
from typer.testing import CliRunner

from masquant.cli import app

FAMILY = "qwen2_5_omni"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, data/ and, once a test made it, out/."""
    root = tmp_path_factory.mktemp("cli")
    tiny_model(FAMILY).save_pretrained(root / "model")
    tiny_processor(FAMILY).save_pretrained(root / "model")
    (root / "model" / "speakers.txt").write_text("side file")
    (root / "data").mkdir()
    samples = tiny_samples(FAMILY, root / "data", count=10)
    rows = [{k: Path(v).name if k in ("image", "audio") else v for k, v in s.items()} for s in samples]
    (root / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def masquant(world: Path, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "masquant.cli", *args],
        cwd=world,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def out(world: Path) -> Path:
    done = masquant(world, "quantize", "model", "-o", "out", "--calibration", "data", "--group-size", "32", "--json")
    found = json.loads(done.stdout)
    assert found["method"] == "masquant" and found["scheme"] == "W4A8"
    return world / "out"


def test_quantize_writes_a_whole_folder(world: Path, out: Path) -> None:
    names = {f.name for f in out.iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "report.json", "README.md", "speakers.txt"} <= names
    assert {"tokenizer.json", "generation_config.json", "processor_config.json"} <= names
    assert not (world / "out.partial").exists()
    card = (out / "README.md").read_text()
    assert "import masquant" in card and "base_model: model" in card
    config = json.loads((out / "config.json").read_text())
    original = json.loads((world / "model" / "config.json").read_text())
    changed = {k for k in config if k not in ("quantization_config", "text_config", "vision_config", "audio_config")
               and config[k] != original.get(k)}  # fmt: skip
    assert not changed
    recipe = (out / "recipe.yaml").read_text()
    done = masquant(
        world, "quantize", "model", "-o", "again", "--calibration", "data", "--recipe", "out/recipe.yaml", "-q"
    )
    assert "again: decoder linears" in done.stdout and not done.stderr
    assert (world / "again" / "recipe.yaml").read_text() == recipe
    assert (world / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_check_and_inspect(world: Path, out: Path) -> None:
    assert "whole; W4A8, 14 quantized linears" in masquant(world, "check", "out").stdout
    found = json.loads(masquant(world, "inspect", "out", "--json", "-").stdout)
    assert found["memory"]["packed_in_memory"] <= 1.05 * found["memory"]["packed_on_disk"]
    assert found["modalities"] == ["text", "vision", "audio"] and found["method"] == "masquant"
    shown = masquant(world, "inspect", "out", "--json", "found.json").stdout
    assert "quantized linears:" in shown and json.loads((world / "found.json").read_text()) == found
    plan = json.loads(masquant(world, "inspect", "model", "--json", "-").stdout)
    assert plan["blocks"] == 2 and [g["group"] for g in plan["groups"]] == ["qkv", "o", "gate_up", "down"]
    assert "decoder linears" in masquant(world, "inspect", "model").stdout
    done = masquant(
        world, "inspect", "model", "--calibration", "data", "--estimate", "--method", "rtn", "--json", "-", "-q"
    )
    shown_all = json.loads(done.stdout)
    ranges = shown_all["ranges"]
    assert len(ranges) == 8 and shown_all["method"] == "rtn"
    assert all(r["absmax"][m] > 0 for r in ranges for m in ("text", "vision", "audio"))
    assert all(db <= 1e-9 for r in ranges for db in r["misalignment_db"].values())
    assert {"seconds", "peak_memory", "disk_bytes", "stages"} <= set(shown_all["estimate"])


def test_inspect_and_dry_run_plan_what_quantize_does(world: Path, out: Path) -> None:
    """The plan's bytes before and after, and its groups, are those of the checkpoint."""
    flags = ("--method", "rtn", "--group-size", "32", "--ignore", "layers.1.mlp.down_proj", "--quantize-lm-head", "-q")
    plan = json.loads(masquant(world, "inspect", "model", *flags, "--json", "-").stdout)
    arguments = ("quantize", "model", "-o", "ignoring", "--calibration", "data", *flags)
    dry = json.loads(masquant(world, *arguments, "--dry-run", "--json").stdout)
    estimate = dry.pop("estimate")
    assert dry == plan and estimate["seconds"] > 0
    masquant(world, *arguments)
    found = json.loads(masquant(world, "inspect", "ignoring", "--json", "-").stdout)
    assert found["bytes"] == plan["bytes"]
    keys = ("group", "blocks", "linears", "weight_bits", "activation_bits", "group_size", "before", "after")
    assert [[g[k] for k in keys] for g in found["groups"]] == [[g[k] for k in keys] for g in plan["groups"]]
    assert found["skipped"] == plan["skipped"]
    ignored = plan["skipped"][0]
    assert ignored["name"] == "mlp.down_proj of blocks 1" and "layers.1.mlp.down_proj" in ignored["reason"]
    assert [g["blocks"] for g in plan["groups"] if g["group"] == "down"] == [[0]]


def test_dry_run_writes_nothing(world: Path) -> None:
    done = masquant(world, "quantize", "model", "-o", "dry", "--calibration", "data", "--dry-run")
    assert "W4A8" in done.stdout and not (world / "dry").exists() and not (world / "dry.partial").exists()
    assert "self_attn.v_proj" in done.stdout and "outside of the blocks; --quantize-lm-head" in done.stdout
    assert "quantizing will take about" in done.stdout and "of disk" in done.stdout
    assert "group size 64 where 128 does not divide 64" in done.stdout


def test_encoders_are_quantized_where_asked(world: Path) -> None:
    """By flag in every command that quantizes, and what each says of it."""
    runner = CliRunner()

    def run(*words: str) -> str:
        paths = [str(world / word) if word in ("model", "data", "encoders") else word for word in words]
        done = runner.invoke(app, paths)
        assert not done.exception, done.output
        return str(done.stdout)

    def skipped(found: dict[str, Any], name: str) -> dict[str, Any]:
        return next(entry for entry in found["skipped"] if entry["name"] == name)

    plan = json.loads(run("inspect", "model", "--quantize-encoders", "--json", "-"))
    assert plan["encoders"] == {"vision": "W8A8", "audio": "W8A16"}
    plain = json.loads(run("inspect", "model", "--json", "-"))
    assert plain["encoders"] == {} and "--quantize-encoders" in skipped(plain, "visual")["reason"]
    assert 0 < skipped(plan, "visual")["bytes"] < 0.2 * skipped(plain, "visual")["bytes"]
    assert plain["bytes"]["encoders"]["before"] == plain["bytes"]["encoders"]["after"]
    assert plan["bytes"]["encoders"]["after"] < 0.6 * plan["bytes"]["encoders"]["before"]
    common = ("--quantize-encoders", "--group-size", "32", "--calibration", "data", "-q")
    dry = run("quantize", "model", "-o", "encoders", "--method", "rtn", "--dry-run", *common)
    assert "vision encoder: linears in W8A8" in dry and "will take about" in dry
    run("quantize", "model", "-o", "encoders", "--method", "rtn", *common)
    assert "encoders:\n  vision: W8A8\n  audio: W8A16\n" in (world / "encoders" / "recipe.yaml").read_text()
    count = json.loads(run("check", "encoders", "--json"))["encoder_linears"]
    assert f"quantized linears and {count} in encoders" in run("check", "encoders")
    checkpoint = json.loads(run("inspect", "encoders", "--json", "-"))
    found = checkpoint["memory"]
    assert found["encoders"] > 0 and found["packed_in_memory"] <= 1.05 * found["packed_on_disk"]
    assert checkpoint["encoders"] == plan["encoders"]
    assert checkpoint["bytes"]["encoders"] == plan["bytes"]["encoders"]
    assert skipped(checkpoint, "visual") == skipped(plan, "visual")
    assert "audio encoder: linears in W8A16" in run("inspect", "encoders")
    file = str(world / "encoders.json")
    run("compare", "model", "--methods", "rtn", *common, "--data", "data", "--no-generate", "--json", file)
    bytes_of = json.loads(Path(file).read_text())["methods"]["rtn"]["bytes"]
    resident = found["float"] + found["lm_head"] + found["encoders"]
    assert bytes_of["float"] == pytest.approx(resident, rel=0.02)


@pytest.mark.parametrize(("command", "where"), [("inspect", "flag"), ("dry-run", "recipe"), ("quantize", "recipe")])
def test_an_ignore_pattern_that_matches_nothing_is_refused(world: Path, command: str, where: str) -> None:
    (world / "typo.yaml").write_text("preset: rtn\nignore: ['re:layers\\.0\\.mpl']\n")
    pattern = ["--ignore", r"re:layers\.0\.mpl"] if where == "flag" else ["--recipe", "typo.yaml"]
    arguments = ["inspect", "model", *pattern]
    if command != "inspect":
        arguments = ["quantize", "model", "-o", "x", "--calibration", "data", *pattern]
    done = masquant(world, *arguments, *(["--dry-run"] if command == "dry-run" else []), code=1)
    assert done.stderr.startswith("error: ignore pattern 're:layers") and "matches none of the linears" in done.stderr
    assert not (world / "x").exists() and not (world / "x.partial").exists()


@pytest.mark.parametrize("command", ["inspect", "dry-run", "quantize"])
def test_a_linear_in_no_group_is_refused(world: Path, command: str) -> None:
    """A model whose blocks have a linear more than its family knows."""
    arguments = ["inspect", "model"]
    if command != "inspect":
        arguments = ["quantize", "model", "-o", "x", "--calibration", "data"]
    script = (
        "import sys, torch\n"
        "from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as m\n"
        "layer = m.Qwen2_5OmniDecoderLayer\n"
        "class Wider(layer):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        self.adapter = torch.nn.Linear(8, 8)\n"
        "m.Qwen2_5OmniDecoderLayer = Wider\n"
        "from masquant.cli import main\n"
        f"sys.argv = {['masquant', *arguments, *(['--dry-run'] if command == 'dry-run' else [])]!r}\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=world, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == "error: layers.0.adapter belongs to no linear group of Qwen2.5-Omni (thinker)\n"
    assert not (world / "x").exists() and not (world / "x.partial").exists()


def test_evaluate(world: Path, out: Path) -> None:
    done = masquant(
        world, "evaluate", "out", "--data", "data", "--baseline", "model", "--json", "r.json", "--no-generate", "-q"
    )
    found = json.loads((world / "r.json").read_text())
    assert found["scheme"] == "W4A8" and found["num_parameters"] > 0 and found["bytes"]["base"] > 0
    assert all("delta_nll" in t for t in found["tasks"].values())
    assert "±" in done.stdout


def test_compare(world: Path) -> None:
    masquant(
        world, "compare", "model", "--methods", "rtn,gptq", "--group-size", "32", "--calibration", "data",
        "--data", "data", "--json", "c.json", "--no-generate", "-q",
    )  # fmt: skip
    found = json.loads((world / "c.json").read_text())
    assert set(found) == {"float", "methods"} and list(found["methods"]) == ["rtn", "gptq"]
    assert all(m["seconds"] > 0 and m["peak_memory"] > 0 for m in found["methods"].values())


def rows_with(world: Path, folder: str, row: str | dict[str, Any]) -> str:
    (world / folder).mkdir(exist_ok=True)
    first = json.dumps({"id": "a", "task": "text", "text": "words"})
    (world / folder / "metadata.jsonl").write_text(first + "\n" + (row if isinstance(row, str) else json.dumps(row)))
    return folder


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", "metadata.jsonl, line 2 is no JSON"),
        ({"id": "b", "task": "t", "prompt": "p"}, "has no answer"),
        ({"id": "b", "task": "t", "prompt": "p", "answer": "a", "audio": "gone.wav"}, "gone.wav does not exist"),
        ({"id": "b", "task": "t", "prompt": "p", "answer": "a", "audio": "bad.wav"}, "no readable sound file"),
        ({"id": "b", "task": "t", "prompt": "p", "answer": "a", "image": "dot.png"}, "1 x 1 pixels is too small"),
        (
            {"id": "b", "task": "t", "prompt": "p", "answer": "a", "image": "vast.png"},
            "20000 x 20000 pixels is too large",
        ),
    ],
)
def test_bad_data_leaves_nothing(world: Path, row: Any, message: str) -> None:
    folder = rows_with(world, "bad", row)
    (world / folder / "bad.wav").write_bytes(b"RIFF")
    Image.new("1", (1, 1)).save(world / folder / "dot.png")
    if not (world / folder / "vast.png").exists():
        Image.new("1", (20_000, 20_000)).save(world / folder / "vast.png")
    before = {f.name for f in world.iterdir()}
    done = masquant(world, "quantize", "model", "-o", "never", "--calibration", folder, code=1)
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert {f.name for f in world.iterdir()} == before


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["quantize", "model", "-o", "x", "--calibration", "none"], 1, "holds no metadata.jsonl"),
        (["quantize", "nowhere/model", "-o", "x", "--calibration", "data"], 1, "cannot read a model config"),
        (["quantize", "model", "-o", "x", "--calibration", "data", "--group-size", "48"], 1, "32, 64, 128 or channel"),
        (["quantize", "model", "-o", "x", "--calibration", "data", "--method", "best"], 1, "unknown method 'best'"),
        (["quantize", "model", "-o", "x", "--calibration", "data", "--scheme", "W2A2"], 2, "W2A2"),
        (["quantize", "model", "--calibration", "data"], 2, "--output"),
        (["quantize", "model", "-o", "no/x", "--calibration", "data"], 1, "does not exist"),
        (["check", "model"], 1, "is no masquant checkpoint"),
        (["check", "nowhere"], 1, "cannot be read"),
        (["frobnicate"], 2, "No such command"),
        (["inspect", "model", "--estimate"], 1, "give --calibration too"),
        (["inspect", "nowhere"], 1, "cannot read a model config"),
    ],
)
def test_mistakes(world: Path, args: list[str], code: int, message: str) -> None:
    assert message in masquant(world, *args, code=code).stderr
    assert not (world / "x").exists()


def test_existing_output(world: Path, out: Path) -> None:
    arguments = (
        "quantize",
        "model",
        "-o",
        "out",
        "--calibration",
        "data",
        "--method",
        "rtn",
        "--group-size",
        "32",
        "-q",
    )
    assert "exists" in masquant(world, *arguments, code=1).stderr
    assert "nothing to resume" in masquant(world, *arguments, "--resume", code=1).stderr


def test_ctrl_c_and_resume(world: Path) -> None:
    """An interrupt between blocks: exit code 1, no folder, and --resume finishes with the same bytes."""
    script = (
        "import masquant.pipeline as p, sys\n"
        "solve = p.Run.solve\n"
        "def stop(self, block, index, groups):\n"
        "    if index == 1: raise KeyboardInterrupt\n"
        "    return solve(self, block, index, groups)\n"
        "p.Run.solve = stop\n"
        "from masquant.cli import main\n"
        "sys.argv = ['masquant', 'quantize', 'model', '-o', 'cut', '--calibration', 'data', '--method', 'gptq',"
        " '--group-size', '32', '-q']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=world, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1 and "--resume goes on" in done.stderr and "Traceback" not in done.stderr
    assert not (world / "cut").exists() and (world / "cut.partial").exists()
    arguments = ("quantize", "model", "--calibration", "data", "--method", "gptq", "--group-size", "32", "-q")
    masquant(world, *arguments, "-o", "cut", "--resume")
    masquant(world, *arguments, "-o", "uncut")
    assert (world / "cut/model.safetensors").read_bytes() == (world / "uncut/model.safetensors").read_bytes()
    assert not (world / "cut.partial").exists()


def test_help_has_examples(world: Path) -> None:
    for command in ("quantize", "inspect", "evaluate", "compare", "report", "check", "demo"):
        assert f"masquant {command}" in masquant(world, command, "--help").stdout
    assert masquant(world, "--version").stdout.strip()
