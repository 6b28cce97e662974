"""Headless Chromium for tests: the machine's, or Debian's packages unpacked into a folder; nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

PACKAGES = ("chromium", "chromium-driver")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Programs(msgspec.Struct, frozen=True):
    """libraries: folders of those that only they need, as a search path."""

    chromium: str
    driver: str
    libraries: str = ""


def programs(folder: Path) -> Programs:
    """Skips the test if they cannot be had."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium and driver:
        return Programs(chromium, driver)
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("chromium and chromedriver are not on PATH, and there is no apt-get to fetch them with")
    wanted = _run(["apt-get", "install", "--simulate", "--no-install-recommends", *PACKAGES], folder)
    names = [line.split()[1] for line in wanted.splitlines() if line.startswith("Inst ")]
    _run(["apt-get", "download", *names], folder)
    for file in folder.glob("*.deb"):
        _run(["dpkg", "-x", str(file), str(folder)], folder)
        file.unlink()
    libraries = sorted({str(file.parent) for file in folder.glob("usr/lib/*-linux-gnu*/**/*.so*")})
    chromium, driver = folder / "usr/lib/chromium/chromium", folder / "usr/bin/chromedriver"
    return Programs(str(chromium), str(driver), ":".join(libraries))


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"chromium is not on PATH, and its packages cannot be fetched: {done.stderr.strip()[-200:]}")
    return done.stdout


def open_browser(folder: Path) -> Chrome:
    """With an empty profile in the folder; to be quit by the caller."""
    found = programs(folder)
    options = ChromeOptions()
    options.binary_location = found.chromium
    for flag in (*_FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options=options, service=Service(found.driver, env=os.environ | {"LD_LIBRARY_PATH": found.libraries}))


def set_screen(browser: Chrome, width: int, height: int, *, dark: bool) -> None:
    screen: dict[str, Any] = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
