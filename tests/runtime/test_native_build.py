"""The kernels' own check, built with sanitizers, and for another architecture under an emulator where one is there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}")


def build(folder: Path, *options: str) -> Path:
    """The check, built."""
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), "-DMASQUANT_SELFTEST=ON", *options],
        ["cmake", "--build", str(folder), "-j", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "warning" not in done.stdout + done.stderr, done.stdout + done.stderr
    return folder / "masquant_selftest"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@needs("cmake", "g++")
def test_addresses_and_undefined_behaviour(tmp_path: Path) -> None:
    out = run(str(build(tmp_path, "-DMASQUANT_SANITIZE=ON")))
    assert "scalar\n" in out and "products agree" in out


@needs("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")
def test_arm_under_an_emulator(tmp_path: Path) -> None:
    toolchain = tmp_path / "aarch64.cmake"
    toolchain.write_text(
        "set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR aarch64)\n"
        "set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)\n"
    )
    check = build(tmp_path / "build", f"-DCMAKE_TOOLCHAIN_FILE={toolchain}")
    assert run("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(check)).startswith("neon\nscalar\n")
