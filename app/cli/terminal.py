"""Talking to a person at a terminal: lines of progress, a question, a table. On standard error,
so that standard output holds only what was asked for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from app.errors import GryphonError
from app.printable import printable


class StatusLine:
    """A line, or a few, rewritten in place; silent when standard error is no terminal."""

    def __init__(self) -> None:
        self._lines = 0
        self._enabled = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._enabled:
            size = shutil.get_terminal_size()
            lines = [one_line(line)[: size.columns - 1] for line in text.split("\n")]
            lines = lines[: size.lines - 1]
            sys.stderr.write(self._cleared() + "\n".join(lines))
            sys.stderr.flush()
            self._lines = len(lines)

    def clear(self) -> None:
        if self._lines:
            sys.stderr.write(self._cleared())
            sys.stderr.flush()
            self._lines = 0

    def _cleared(self) -> str:
        """Back to the first line, and nothing below."""
        up = f"\x1b[{self._lines - 1}A" if self._lines > 1 else ""
        return f"{up}\r\x1b[J"


class Thinking:
    """What a model thinks before it answers: dim, and apart from the answer, which it precedes."""

    def __init__(self) -> None:
        self._shown = False
        self._is_dim = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if text:
            sys.stderr.write(f"\x1b[2m{printable(text)}\x1b[22m" if self._is_dim else text)
            sys.stderr.flush()
            self._shown = True

    def end(self) -> None:
        """Leave an empty line before the answer."""
        if self._shown:
            sys.stderr.write("\n\n")
            sys.stderr.flush()
            self._shown = False


def write_answer(text: str) -> None:
    """Write what a model wrote: as it is, but nothing that a terminal would obey."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)


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


def one_line(text: str) -> str:
    """Text that others chose, on one line and without what a terminal would obey."""
    return "".join(char if char.isprintable() else "�" for char in text)


def human_time(seconds: float) -> str:
    """A duration for people: 45 s, 3:20 min, 2:05 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def confirm(question: str, *, default: bool = True) -> bool:
    """Ask on the terminal; Enter is the default. Ask only when `can_ask`."""
    sys.stderr.write(f"{question} [{'Y/n' if default else 'y/N'}] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer:
        sys.stderr.write("\n")
        raise GryphonError("declined", "No answer: nothing was done. `--yes` does not ask.")
    said = answer.strip().lower()
    return said in ("y", "yes") or (default and not said)


def can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned left under their names."""
    lines = [tuple(header), *(tuple(map(one_line, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
