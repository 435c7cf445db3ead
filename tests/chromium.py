"""The system's Chromium, without a window, by Playwright."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_PROGRAM = next(filter(None, map(shutil.which, _NAMES)), None)
needs_chromium = pytest.mark.skipif(
    _PROGRAM is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium, and the dependency group `page`",
)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A Playwright browser."""
    from playwright.sync_api import sync_playwright

    arguments = ["--mute-audio", "--autoplay-policy=no-user-gesture-required"]
    arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=_PROGRAM, args=arguments)
        yield browser
        browser.close()
