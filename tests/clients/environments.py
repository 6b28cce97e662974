"""An environment of its own for each client, under `.client-envs`: their packages conflict with each other and with ours.

Made once for each list of packages; a stamp in it says that it is whole. Nothing is installed elsewhere.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / ".client-envs"
_INSTALL_S = 300.0


def python_with(requirements: Path) -> Path:
    """An interpreter that has these packages. Skips the test if they cannot be had."""
    folder = FOLDER / f"{requirements.parent.name}-{requirements.stem}"
    python = folder / "bin" / "python"
    if not _is_made(folder, requirements):
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--no-input"]
        _run([*pip, "install", "--quiet", "--no-compile", "--requirement", str(requirements)])
        _stamp(folder, requirements).touch()
    return python


def node_with(package_json: Path) -> Path:
    """A folder with these packages, `node` among them, in `node_modules`. Skips the test if they cannot be had."""
    folder = FOLDER / package_json.parent.name
    if not _is_made(folder, package_json):
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not on PATH (Debian: apt install npm)")
        folder.mkdir(parents=True)
        shutil.copy(package_json, folder)
        _run([npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--loglevel=error"])
        _stamp(folder, package_json).touch()
    return folder


def _stamp(folder: Path, packages: Path) -> Path:
    return folder / f".made-{hashlib.sha256(packages.read_bytes()).hexdigest()[:16]}"


def _is_made(folder: Path, packages: Path) -> bool:
    """If it is not, what is there of an older list or of a set-up that was cut short is removed."""
    if _stamp(folder, packages).exists():
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the client's packages did not come within {_INSTALL_S:g} s: {' '.join(command[-3:])}")
    if done.returncode:
        pytest.skip(f"the client's packages cannot be had: {(done.stderr or done.stdout).strip()[-400:]}")
