"""Environments for programs of others, under `.client-envs`: their packages conflict with each other and with ours.

Each is made once for each list of packages; a stamp in it says that it is whole. Nothing is installed elsewhere.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".client-envs"
_INSTALL_S = 600.0


class CannotBeHad(Exception):
    """The packages, and why."""


def python_with(requirements: Path, rather: str | None = None) -> Path:
    """An interpreter that has the packages of this file. rather: one that is installed first, alone, if it can be had. Raises
    CannotBeHad."""
    folder = FOLDER / f"{requirements.parent.name}-{requirements.stem}"
    python = folder / "bin" / "python"
    if not _is_made(folder, requirements):
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--no-input"]
        install = [*pip, "install", "--quiet", "--no-compile"]
        if rather is not None:
            subprocess.run([*install, "--no-deps", rather], capture_output=True, timeout=_INSTALL_S, check=False)
        _run([*install, "--requirement", str(requirements)])
        _stamp(folder, requirements).touch()
    return python


def node_with(package_json: Path) -> Path:
    """A folder with the packages of this file, `node` among them, in `node_modules`. Raises CannotBeHad."""
    folder = FOLDER / package_json.parent.name
    if not _is_made(folder, package_json):
        npm = shutil.which("npm")
        if npm is None:
            raise CannotBeHad("npm is not on PATH (Debian: apt install npm)")
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
        raise CannotBeHad(f"{command[-1]}: not installed within {_INSTALL_S:g} s") from None
    if done.returncode:
        raise CannotBeHad(f"{command[-1]}: {(done.stderr or done.stdout).strip()[-400:]}")
