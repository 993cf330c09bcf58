"""The terminal chat as an application."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from textual.app import App, SystemCommand
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.widget import MountError
from textual.worker import WorkerFailed

from app import paths
from app.history.store import History
from app.library.installed import InstalledModel
from app.tui.background import in_daemon_thread
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
        self._server = server
        self._is_leaving = False
        self.chat_screen = ChatScreen(self.session, offer=offer, server=server)

    def get_default_screen(self) -> Screen[None]:
        return self.chat_screen

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        chat = self.chat_screen
        yield SystemCommand("New chat", "Start an empty chat (Ctrl+N)", chat.action_new_chat)
        yield SystemCommand("Retry", "Ask the last question again (Ctrl+R)", chat.action_retry)
        yield from super().get_system_commands(screen)

    async def action_quit(self) -> None:
        """Leave, but not ahead of the letters typed before: they still wait for the prompt."""
        self.chat_screen.prompt.call_later(self._leave)

    def _leave(self) -> None:
        self.session.typed = self.chat_screen.prompt.text
        self.exit()

    def exit(self, *arguments: Any, **options: Any) -> None:
        self._is_leaving = True
        super().exit(*arguments, **options)

    def _handle_exception(self, error: Exception) -> None:
        """A fault of ours ends the chat with one sentence; the traceback goes to a file."""
        cause = error.error if isinstance(error, WorkerFailed) else error
        if self._is_leaving and isinstance(cause, (NoMatches, MountError)):
            return  # a painter or a handler found its widgets taken away
        if self.is_headless:
            super()._handle_exception(error)  # tests want the exception itself
            return
        log = paths.state_dir() / "tui.log"
        with paths.open_private(log) as file:
            lines = traceback.format_exception(error)
            file.write("".join([time.strftime("%F %T "), *lines]).encode())
        self.exit(
            return_code=1,
            message=f"gryphon: the chat stopped on a fault of its own ({type(cause).__name__}). "
            f"What you wrote and what came is saved; {log} says more.",
        )

    async def on_unmount(self) -> None:
        # The endpoint goes first: as long as it is attached, the engine would stay for it.
        if self._server is not None:
            await in_daemon_thread(self._server.stop)
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
        history.close()


async def _until_quit(app: ChatApp) -> None:
    """Run `app`; a closed terminal window and a polite kill end it as quitting does."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, app.exit)
    await app.run_async()
