"""Shared fixtures. Every test has a GRYPHON_HOME of its own; nothing touches the user's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Before anything imports MLX, as in the engine process: otherwise the tests take minutes longer.
# The prepared library is the one thing all tests share.
_SHARED = Path(tempfile.gettempdir()) / f"gryphon-tests-{os.getuid()}"
os.environ["GRYPHON_HOME"] = str(_SHARED)
if "PYTEST_XDIST_WORKER" in os.environ:
    # OpenBLAS's threads spin while they wait for each other: on cores that other test processes
    # use too, a product then takes many times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from app.engine import blas  # noqa: E402  (needs GRYPHON_HOME)

blas.preload()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty GRYPHON_HOME but for the prepared library."""
    path = tmp_path / "gryphon home"  # a space, because people have them
    path.mkdir(mode=0o700)
    (path / "cache").mkdir(mode=0o700)
    (_SHARED / "cache" / "blas").mkdir(parents=True, exist_ok=True)
    (path / "cache" / "blas").symlink_to(_SHARED / "cache" / "blas")
    monkeypatch.setenv("GRYPHON_HOME", str(path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return path


# A test may be skipped for these reasons and no other: "green" must mean that it ran.
ALLOWED_SKIPS = (
    "tmux is not installed",  # elsewhere than in CI, which installs it
    "Node is not installed",  # likewise
    "the embedded model cannot be fetched",  # no package index in reach
    "answers batches of RecurrentGemma correctly",  # mlx-lm, of which we say that it does not
    "a client cannot be installed",  # no package index in reach
    "only the Metal host sees what a kernel does",  # on a Mac, where the kernels meet the GPU
)
_unlisted_skips: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        in_ci = bool(os.environ.get("CI"))
        if in_ci or not any(allowed in reason for allowed in ALLOWED_SKIPS):
            _unlisted_skips.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unlisted_skips:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for skipped in _unlisted_skips:
        terminalreporter.write_line(f"skipped for no listed reason: {skipped}", red=True)
