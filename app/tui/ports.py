"""What the chat needs from others, handed in by the command line: faces never import each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from app.engine.client import EngineClient
from app.library.installed import InstalledModel

EngineFactory = Callable[[], EngineClient]
"""Called once, inside the app's event loop, after the first paint."""

PullProgress = Callable[[str, int, int], None]
"""Called with what is being done ("downloading" …), and the bytes of a total (0: unknown)."""


class PullCancelled(Exception):
    """Raised by the progress callback when the person no longer wants the model."""


@dataclass(frozen=True)
class ModelOffer:
    """The model to offer when none is installed, and how to get it."""

    name: str
    size: str
    """For people: "93 MB"."""
    pull: Callable[[PullProgress], InstalledModel]
    """Downloads and installs it, in a thread of its own; raises `GryphonError` when it cannot."""


class Server(Protocol):
    """The REST endpoint that runs beside the chat, in its own thread."""

    @property
    def url(self) -> str: ...

    def start(self) -> None:
        """Return once it accepts connections.

        Raises:
            GryphonError: it cannot, for example because the port is in use.
        """

    def stop(self) -> None:
        """End it; nothing to do when it was never started."""
