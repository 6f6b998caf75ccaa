"""A headless Chromium for pages; tests skip where playwright or a browser is not installed."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser: the system's, or playwright's own."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        system = next(
            (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
            None,
        )
        executable = system or playwright.chromium.executable_path
        if not Path(executable).exists():
            pytest.skip("no Chromium is installed")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
