"""Changing a file of another program: what would change is shown, what was is kept."""

from __future__ import annotations

import datetime
import difflib
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from app.cli.config_text import MAX_CHARACTERS, NotEditable, Unreadable
from app.cli.editors.configuration import EditorFile
from app.errors import GryphonError
from app.printable import printable

# Of what stands beside a change in the user's own file, keys and the like are not shown.
_SECRET = re.compile(
    r"""((?:key|token|secret|password|bearer)["']?\s*[:=]\s*["']?)([^"'\s,{}$][^"'\s,]{3,})""", re.I
)


@dataclass(frozen=True)
class Change:
    """A file as it is and as it would be."""

    path: Path
    """As the editor names it; may be a link."""
    target: Path
    """The file itself."""
    old: bytes | None
    """None where there is none yet."""
    new: bytes

    @property
    def diff(self) -> str:
        """For people: unified, secrets hidden."""
        lines = difflib.unified_diff(
            _lines(self.old or b""),
            _lines(self.new),
            str(self.path) if self.old is not None else "/dev/null",
            str(self.path),
            lineterm="",
        )
        return "\n".join(_SECRET.sub(r"\1********", printable(line)) for line in lines)


def planned(file: EditorFile) -> Change | None:
    """What writing `file` would change; None when all is there already.

    Raises:
        GryphonError: "config_unreadable" or "config_not_editable", naming the file and why.
    """
    target = _target(file.path)
    old = _read(file.path, target)
    try:
        text = (old or b"").decode()
        new = file.edited(text).encode()
    except UnicodeDecodeError:
        raise _refused("config_unreadable", file.path, "it is not UTF-8") from None
    except Unreadable as error:
        raise _refused("config_unreadable", file.path, str(error)) from None
    except NotEditable as error:
        raise _refused("config_not_editable", file.path, str(error)) from None
    return None if new == old else Change(file.path, target, old, new)


def write(change: Change) -> Path | None:
    """Put the change in its place, whole or not at all; returns the copy of what was there.

    Raises:
        GryphonError: "config_changed" when somebody else wrote it meanwhile; "config_not_written".
    """
    target = change.target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _read(change.path, target) != change.old:
            raise GryphonError(
                "config_changed",
                f"{change.path} was changed by somebody else just now. Nothing was written; try "
                "again.",
            )
        backup = None if change.old is None else _kept(target, change.old)
        mode = 0o600 if change.old is None else stat.S_IMODE(target.stat().st_mode)
        _replace(target, change.new, mode)
    except OSError as error:
        raise GryphonError(
            "config_not_written",
            f"{change.path} was not changed: {error.strerror or error}.",
        ) from error
    return backup


def _target(path: Path) -> Path:
    """Where a link leads, so that the file in somebody's collection of dotfiles is changed and the
    link stays."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise _refused("config_unreadable", path, "its links lead in a circle") from error


def _read(path: Path, target: Path) -> bytes | None:
    try:
        # Without this a named pipe would be waited for.
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refused("config_unreadable", path, error.strerror or str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refused("config_unreadable", path, "it is not a file")
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(MAX_CHARACTERS * 4 + 1)
    if len(content) > MAX_CHARACTERS * 4:
        raise _refused("config_unreadable", path, f"it is longer than {MAX_CHARACTERS * 4} bytes")
    return content


def _kept(target: Path, content: bytes) -> Path:
    """Write a copy beside it, as private as it is, under a name that is not taken."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    mode = stat.S_IMODE(target.stat().st_mode)
    for count in range(1000):
        name = f"{target.name}.before-gryphon-{now}{f'-{count}' if count else ''}"
        try:
            descriptor = os.open(
                target.with_name(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600
            )
        except FileExistsError:
            continue
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
        return target.with_name(name)
    raise FileExistsError("too many copies beside it")


def _replace(target: Path, content: bytes, mode: int) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _lines(content: bytes) -> list[str]:
    return content.decode().splitlines()


def _refused(code: str, path: Path, why: str) -> GryphonError:
    return GryphonError(
        code,
        f"{path} was left as it is: {why}. Without --write, `gryphon editor` prints what to put "
        "there.",
    )
