"""What an editor's configuration is made from, and what it is made of."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import platformdirs
import platformdirs.unix

from app.cli.config_text import NotEditable, Put, TextFormat, edited, script
from app.errors import GryphonError
from app.settings import Settings

KEY_VARIABLE = "GRYPHON_API_KEY"
PLACEHOLDER_KEY = "gryphon"
"""What editors that insist on a key get when the endpoint asks for none."""

ASSUMED_CONTEXT = 32_768
"""Tokens told to an editor that needs a number for a model without a limit."""
_MOST_OUTPUT = 8192


@dataclass(frozen=True)
class Endpoint:
    """Where the editor will find Gryphon."""

    url: str
    """http://ADDRESS:PORT, or https"""
    is_running: bool
    needs_key: bool
    shown_key: str | None = None
    """The key itself, where the user asked to see it."""

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    def key(self, reference: str | None) -> str | None:
        """What to write where a key goes: `reference`, as the editor spells a variable of the
        environment, unless there is no key or it is to be shown."""
        if not self.needs_key:
            return PLACEHOLDER_KEY
        return self.shown_key or reference


@dataclass(frozen=True)
class ServedModel:
    """An installed model as editors need to know it."""

    name: str
    context_length: int | None
    """Tokens; None when the model has no limit."""
    has_tools: bool
    """Its chat template can tell it of tools."""

    @property
    def context(self) -> int:
        return self.context_length or ASSUMED_CONTEXT

    @property
    def output(self) -> int:
        """A share of the context for the answer, where an editor divides it beforehand."""
        return min(_MOST_OUTPUT, self.context // 4)


@dataclass(frozen=True)
class Places:
    """Directories that editors keep their files in."""

    home: Path
    xdg_config: Path
    """~/.config, also on macOS, for editors that came from Linux."""
    config: Path
    """~/Library/Application Support on macOS, ~/.config on Linux."""
    codex: Path
    claude: Path

    @classmethod
    def here(cls) -> Places:
        """On this machine.

        Raises:
            GryphonError: "no_home".
        """
        settings = Settings.from_environment()
        try:
            home = Path.home()
        except RuntimeError as error:
            raise GryphonError(
                "no_home", f"Your home directory is unknown ({error}). Set HOME."
            ) from error
        return cls(
            home=home,
            xdg_config=platformdirs.unix.Unix().user_config_path,
            config=platformdirs.user_config_path(),
            codex=settings.codex_home or home / ".codex",
            claude=settings.claude_config_dir or home / ".claude",
        )


@dataclass(frozen=True)
class Setup:
    """This machine: the endpoint, its models, the default one first, and where files go."""

    endpoint: Endpoint
    models: Sequence[ServedModel]
    places: Places

    @property
    def model(self) -> ServedModel:
        """For editors that use one."""
        return self.models[0]


class EditorFile(Protocol):
    """A file of an editor, and what is to be in it."""

    @property
    def path(self) -> Path: ...

    def edited(self, text: str) -> str:
        """`text`, "" for a file that is not there, with what Gryphon needs in it.

        Raises:
            Unreadable, NotEditable: see `app.cli.config_text`.
        """


@dataclass(frozen=True)
class SettingsFile:
    """A file of settings in a format that can be read."""

    path: Path
    text_format: TextFormat
    puts: Sequence[Put]
    refused_with: Sequence[tuple[str, str]] = ()
    """Keys at the top that the puts cannot stand beside, and why."""

    def edited(self, text: str) -> str:
        new = edited(self.text_format, text, self.puts)
        known = self.text_format.read(text) if self.refused_with else None
        for key, why in self.refused_with:
            if isinstance(known, dict) and key in known:
                raise NotEditable(why)
        return new


@dataclass(frozen=True)
class ScriptFile:
    """A script that gets a block of lines."""

    path: Path
    lines: Sequence[str]
    comment: str
    guards: str

    def edited(self, text: str) -> str:
        return script.with_block(text, list(self.lines), comment=self.comment, guards=self.guards)


@dataclass(frozen=True)
class Configuration:
    """All that an editor needs."""

    title: str
    files: Sequence[EditorFile] = ()
    command: Sequence[str] = ()
    """For a shell, without any file."""
    steps: Sequence[str] = ()
    """What to click or do besides."""
    notes: Sequence[str] = field(default=())


def key_note(setup: Setup, how: str) -> list[str]:
    """A note on the key, where there is one to tell of."""
    if not setup.endpoint.needs_key:
        return []
    shown = setup.endpoint.shown_key
    return [f"The endpoint needs its API key{f', {shown}' if shown else ''}: {how}"]


def tools_note(setup: Setup) -> list[str]:
    """A note for agents: which models cannot be told of tools."""
    without = [one.name for one in setup.models if not one.has_tools]
    if not without:
        return []
    return [f"Without tools, so for chat but not as an agent: {', '.join(without)}."]


def quoted(text: str) -> str:
    """`text` as one word of a shell."""
    return shlex.quote(text)
