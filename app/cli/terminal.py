"""Talking to a person at a terminal: one line of progress, a question, a table. On standard error,
so that standard output holds only what was asked for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from app.errors import GryphonError


class StatusLine:
    """One line that is rewritten in place; silent when standard error is no terminal."""

    def __init__(self) -> None:
        self._shown = False
        self._enabled = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._enabled:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[2K{text[:width]}")
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._shown = False


class Thinking:
    """What a model thinks before it answers: dim, and apart from the answer, which it precedes."""

    def __init__(self) -> None:
        self._shown = False
        self._is_dim = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if text:
            sys.stderr.write(f"\x1b[2m{text}\x1b[22m" if self._is_dim else text)
            sys.stderr.flush()
            self._shown = True

    def end(self) -> None:
        """Leave an empty line before the answer."""
        if self._shown:
            sys.stderr.write("\n\n")
            sys.stderr.flush()
            self._shown = False


def bar(done: int, total: int, width: int = 24) -> str:
    """A progress bar; how much there is where the total is unknown (0)."""
    if total <= 0:
        return human_bytes(done)
    filled = min(width, width * done // total)
    return f"[{'#' * filled}{'-' * (width - filled)}] {100 * done // total:3d}%"


def human_bytes(count: float) -> str:
    """Bytes for people, decimal as in download sizes: 93 MB."""
    if count < 1000:
        return f"{count:.0f} bytes"
    power = 1 if count < 1e6 else 2 if count < 1e9 else 3
    amount = count / 1000**power
    unit = ("kB", "MB", "GB")[power - 1]
    return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"


def printable(text: str) -> str:
    """Text that others chose, on one line and without what a terminal would obey."""
    return "".join(char if char.isprintable() else "�" for char in text)


def confirm(question: str) -> bool:
    """Ask on the terminal, yes by default. Ask only when `can_ask`."""
    sys.stderr.write(f"{question} [Y/n] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer:
        sys.stderr.write("\n")
        raise GryphonError("declined", "No answer: nothing was downloaded. `--yes` does not ask.")
    return answer.strip().lower() in ("", "y", "yes")


def can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned left under their names."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
