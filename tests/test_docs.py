"""Every command and every piece of Python in docs/ runs, in the order of its page, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import xml.etree.ElementTree
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_model, tiny_processor, tiny_samples
from typer.testing import CliRunner

from masquant.cli import app

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("how-it-works", "recipes", "format", "benchmarks", "faq")
FAMILY = "qwen2_5_omni"
_BLOCK = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of a page's fenced blocks."""
    return [(found[1], found[2]) for found in _BLOCK.finditer((DOCS / f"{page}.md").read_text())]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and data/, as the pages assume."""
    root = tmp_path_factory.mktemp("docs")
    tiny_model(FAMILY).save_pretrained(root / "model")
    tiny_processor(FAMILY).save_pretrained(root / "model")
    for seed, name in enumerate(("calibration", "evaluation")):
        rows = tiny_samples(FAMILY, root / "data" / name, count=4, seed=seed)
        rows = [{k: Path(v).name if k in ("image", "audio") else v for k, v in row.items()} for row in rows]
        (root / "data" / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs(page: str, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").symlink_to(start / "model")
    (tmp_path / "data").symlink_to(start / "data")
    monkeypatch.chdir(tmp_path)
    runner, ran = CliRunner(), 0
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, f"{page}.md", "exec"), {})
            ran += 1
        if language == "yaml" and "preset:" in text:
            Path("recipe.yaml").write_text(text)
        for line in text.splitlines() if language == "" else ():
            words = shlex.split(line)
            assert words[0] == "masquant", line
            options = ["--overwrite"] if words[1] == "quantize" and Path(words[words.index("-o") + 1]).exists() else []
            done = runner.invoke(app, [*words[1:], *options])
            assert not done.exception, f"{line}\n{done.output}\n{done.exception!r}"
            ran += 1
    assert ran >= 3
    shutil.rmtree(tmp_path)


def test_links_and_pictures_exist() -> None:
    for file in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            if not target.startswith("http"):
                assert (file.parent / target).exists(), f"{file.name}: {target}"
    for picture in (DOCS / "pictures").glob("*.svg"):
        assert "var(--" not in picture.read_text()
        assert xml.etree.ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_methods_and_schemes_are_all_described() -> None:
    from masquant.recipe import PRESETS, SCHEMES

    text = (DOCS / "recipes.md").read_text()
    assert all(f"| `{name}` |" in text for name in (*PRESETS, *SCHEMES))


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_tasks_of_lmms_eval_exist() -> None:
    """The commands need data sets of the hub; that their tasks exist can be known without."""
    spec = importlib.util.find_spec("lmms_eval")
    assert spec is not None and spec.submodule_search_locations
    files = Path(spec.submodule_search_locations[0]).glob("tasks/**/*.yaml")
    known = {
        name.strip("\"' ") for f in files for name in re.findall(r"^(?:task|group) *: *(\S+)", f.read_text(), re.M)
    }
    own = {yaml.safe_load(t.replace("!function ", ""))["task"] for lang, t in blocks("benchmarks") if lang == "yaml"}
    named: set[str] = set()
    for language, text in blocks("benchmarks"):
        for line in text.splitlines() if language == "lmms-eval" else ():
            words = shlex.split(line)
            assert words[:5] == ["lmms-eval", "--model", "masquant", "--model_args", "pretrained=out"]
            named |= set(words[words.index("--tasks") + 1].split(","))
    assert len(named) >= 9 and named <= known | own
