"""What each editor has to be told so that it uses Gryphon: one module per editor.

A module has `configure(setup)`, which returns a `Configuration`. It names the page of the
editor's documentation that its keys are taken from.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:  # the command line's parser asks for the names alone
    from app.cli.editors.configuration import Configuration, Setup

EDITORS = {
    "zed": "zed",
    "continue": "continue_dev",
    "vscode": "vscode",
    "jetbrains": "jetbrains",
    "aider": "aider",
    "llama-vim": "llama_vim",
    "claude-code": "claude_code",
    "codex": "codex",
    "opencode": "opencode",
}
"""Name on the command line to module."""


class _Editor(Protocol):
    def configure(self, setup: Setup) -> Configuration: ...


def configure(editor: str, setup: Setup) -> Configuration:
    """What `editor`, a key of `EDITORS`, needs on this machine.

    Raises:
        GryphonError: its own files forbid it.
    """
    module = importlib.import_module(f"{__name__}.{EDITORS[editor]}")
    return cast(_Editor, module).configure(setup)
