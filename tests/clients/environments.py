"""An environment for each client, as its authors' installers make it, kept between runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from app.library.file_lock import locked

_PINS = Path(__file__).parent / "environments"
_KEPT = Path(tempfile.gettempdir()) / f"gryphon-tests-{os.getuid()}" / "clients"
_UV = Path(sys.executable).with_name("uv")
_INSTALL_S = 170


def python_with(client: str) -> Path:
    """The interpreter of an environment that holds what environments/CLIENT.txt names."""

    def install(place: Path) -> None:
        _run(str(_UV), "venv", "--quiet", "--python", sys.executable, str(place))
        _run(
            str(_UV), "pip", "install", "--quiet", "--no-deps",
            "--python", str(place / "bin" / "python"), "-r", str(_PINS / f"{client}.txt"),
        )  # fmt: skip

    pins = _PINS / f"{client}.txt"
    return _kept(client, pins.read_bytes() + sys.version.encode(), install) / "bin" / "python"


def node_modules() -> Path:
    """A directory with the packages of environments/node beside it."""
    if shutil.which("npm") is None:
        pytest.skip("a client cannot be installed: Node is not here")

    def install(place: Path) -> None:
        place.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(_PINS / "node" / name, place)
        _run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", cwd=place)

    lock = _PINS / "node" / "package-lock.json"
    return _kept("node", lock.read_bytes(), install)


def _kept(name: str, contents: bytes, install: Callable[[Path], None]) -> Path:
    """The directory that `install` makes of `contents`, made once on this machine."""
    _KEPT.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = _KEPT / f"{name}-{hashlib.sha256(contents).hexdigest()[:16]}"
    whole = place / "whole"
    with locked(_KEPT / f"{name}.lock", lambda: None):
        if not whole.exists():
            shutil.rmtree(place, ignore_errors=True)
            install(place)
            whole.touch()
    return place


def _run(*words: str, cwd: Path | None = None) -> None:
    """Run an installer; where it cannot reach its index, the test is skipped and says so."""
    try:
        subprocess.run(
            words, cwd=cwd, check=True, capture_output=True, text=True, timeout=_INSTALL_S
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = error.stderr if isinstance(error.stderr, str) else ""
        pytest.skip(f"a client cannot be installed: {said.strip()[-300:] or error}")
