"""A child process of ours that does one piece of work and reports it, a JSON object a line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.library.wheel_fetch import running
from app.settings import child_environment


def run(
    module: str, arguments: list[str], log: Path, hear: Callable[[dict[str, Any]], None]
) -> str | None:
    """Run a module to its end; an exception of `hear`, or Ctrl-C, ends it.

    Args:
        log: Gets what it writes to its standard error.
        hear: Called with each object.

    Returns:
        None if it ended well, else why it did not: the last line of the log.
    """
    # -P: an app.py where the user stands must not take the place of our package.
    command = [sys.executable, "-P", "-m", module, *arguments]
    with (
        log.open("w+b") as output,
        running(command, child_environment(), subprocess.PIPE, output) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            hear(json.loads(line))
        child.wait()
        output.seek(0)
        messages = output.read().decode(errors="replace").split("\n")
    if child.returncode == 0:
        return None
    return next((line for line in reversed(messages) if line), f"exit {child.returncode}")
