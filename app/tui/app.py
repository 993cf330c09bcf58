"""The terminal chat as an application."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from textual.app import App, SystemCommand
from textual.screen import Screen

from app import paths
from app.history.store import History
from app.library.installed import InstalledModel
from app.tui.ports import EngineFactory, ModelOffer, Server
from app.tui.screens.chat import ChatScreen
from app.tui.session import Session


class ChatApp(App[None]):
    """One chat screen over one session. It opens the history and owns the engine it was given
    the means to make."""

    TITLE = "Gryphon"
    CSS_PATH: ClassVar[str] = "app.tcss"

    def __init__(
        self,
        *,
        history: History,
        model: InstalledModel | None,
        engine_factory: EngineFactory,
        offer: ModelOffer | None = None,
        server: Server | None = None,
    ) -> None:
        super().__init__()
        self.session = Session(history, model, engine_factory)
        self.chat_screen = ChatScreen(self.session, offer=offer, server=server)

    def get_default_screen(self) -> Screen[None]:
        return self.chat_screen

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        chat = self.chat_screen
        yield SystemCommand("New chat", "Start an empty chat (Ctrl+N)", chat.action_new_chat)
        yield SystemCommand("Retry", "Ask the last question again (Ctrl+R)", chat.action_retry)
        yield from super().get_system_commands(screen)

    async def on_unmount(self) -> None:
        await self.session.close()


def run_chat(
    *,
    model: InstalledModel | None,
    engine_factory: EngineFactory,
    offer: ModelOffer | None = None,
    server: Server | None = None,
    history_path: Path | None = None,
) -> int:
    """Run the terminal chat until the person quits.

    Args:
        model: The model to talk to; None shows the first screen with `offer`.
        engine_factory: Makes the `EngineClient`; called inside the app's event loop, after the
            first paint. The app closes it.
        offer: The model to offer when none is installed.
        server: The REST endpoint beside the chat, not yet started. It is started in a thread after
            the first paint, and stopped at the end; a `GryphonError` from its start becomes a
            notice and the chat goes on.
        history_path: Where the chats are; `paths.history_path()` when None.

    Returns:
        The exit code.

    Raises:
        GryphonError: the history cannot be opened.
    """
    history = History(history_path or paths.history_path())
    try:
        app = ChatApp(
            history=history,
            model=model,
            engine_factory=engine_factory,
            offer=offer,
            server=server,
        )
        asyncio.run(_until_quit(app))
        return app.return_code or 0
    finally:
        if server is not None:
            server.stop()
        history.close()


async def _until_quit(app: ChatApp) -> None:
    """Run `app`; a closed terminal window and a polite kill end it as quitting does."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, app.exit)
    await app.run_async()
