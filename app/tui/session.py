"""The chat without its screen: the model, the engine, and at most one answer in progress."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable

from app.engine.client import EngineClient
from app.engine.protocol import Failed, GenerationRequest, Progress
from app.errors import GryphonError
from app.history.forgetting import forget_deleted
from app.history.store import History
from app.library.installed import InstalledModel
from app.tui.answering import Answering, describe
from app.tui.chat import Chat
from app.tui.ports import EngineFactory


class Session:
    """Lives in the app's event loop and owns what must be tidied up when the app ends."""

    def __init__(
        self, history: History, model: InstalledModel | None, engine_factory: EngineFactory
    ) -> None:
        self.chat = Chat(history)
        self.model = model
        self.answering: Answering | None = None
        """The answer in progress, or the last one."""
        self.loading: str | None = None
        """What the engine is doing to make the model ready; None when nothing."""
        self.load_error: str | None = None
        self.typed = ""
        """What is in the prompt."""
        self._engine_factory = engine_factory
        self._engine: EngineClient | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_answering(self) -> bool:
        return self.answering is not None and not self.answering.ended.is_set()

    @property
    def state(self) -> str:
        """What is going on, in a word or two."""
        if self.answering is not None and self.is_answering:
            return "stopping" if self.answering.stop_asked else self.answering.activity
        if self.loading is not None:
            return self.loading
        if self.model is None:
            return "no model"
        return "not loaded" if self.load_error else "idle"

    @property
    def context(self) -> tuple[int, int | None]:
        """Tokens of the context in use, and its limit where the model has one."""
        limit = self.model.context_length if self.model else None
        if self.answering is not None and self.is_answering:
            used = self.answering.prompt_tokens + self.answering.tokens
            return used, self.answering.context_length or limit
        for message in reversed(self.chat.path):
            if stats := message.stats:
                used = stats.prompt_tokens + stats.completion_tokens
                return used, stats.context_length or limit
        return 0, limit

    async def load_model(self, on_change: Callable[[], None]) -> None:
        """Start the engine and make the model resident, so that it loads while people type."""
        if self.model is None:
            return
        self.loading, self.load_error = "starting engine", None
        on_change()
        try:
            engine = self._get_engine()
            await engine.start()
            async for event in engine.load(self.model.ref):
                if isinstance(event, Progress):
                    self.loading = describe(event)
                elif isinstance(event, Failed):
                    self.load_error = event.message
                on_change()
        except GryphonError as error:
            self.load_error = error.message
        self.loading = None
        on_change()

    def answer(self, on_save_failed: Callable[[GryphonError], None]) -> Answering:
        """Begin an answer to the last question of the path.

        Raises:
            GryphonError: the history cannot be written; nothing was begun.
        """
        assert self.model is not None and not self.is_answering
        self._close_answering()
        row = self.chat.begin_answer(self.model.name)
        request = GenerationRequest(
            id=uuid.uuid4().hex,
            model=self.model.ref,
            messages=self.chat.request_messages(),
            chat=self.chat.engine_chat,
        )
        self.answering = answering = Answering(
            row, request, history=self.chat.history, on_save_failed=on_save_failed
        )
        self._task = asyncio.create_task(self._run(answering))
        return answering

    async def _run(self, answering: Answering) -> None:
        try:
            await answering.run(self._get_engine())
        finally:
            self.chat.replace_leaf(answering.row)

    async def cancel(self) -> None:
        """Ask the engine for an early end."""
        if self.is_answering and self.answering is not None:
            self.answering.stop_asked = True
            await self._get_engine().cancel(self.answering.request.id)

    async def settled(self) -> None:
        """Wait for the answer's task, so that a fault in it is not lost."""
        if self._task is not None:
            await self._task

    async def start_new_chat(self) -> None:
        """Leave this chat, and with it the answer in progress."""
        await self.drop_answer()
        self._close_answering()
        self.chat.start_new()
        self.answering = None

    async def drop_answer(self) -> None:
        """End the answer in progress here and now, keeping what has come."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait({self._task})
        self._task = None
        # A task cancelled before its first step never ran, not even its clean-up.
        if self.is_answering and self.answering is not None:
            self.answering.end("cancelled")
            self.chat.replace_leaf(self.answering.row)

    async def close(self) -> None:
        """Save what came and what is typed, and let go of the engine."""
        await self.drop_answer()
        # The screen is gone by now: a fault of the file can only be met by ending anyway.
        self._close_answering()
        with contextlib.suppress(GryphonError):
            self.chat.save_draft(self.typed)
        if self._engine is not None:
            with contextlib.suppress(GryphonError):
                await forget_deleted(self.chat.history, self._engine.forget_chat)
            await self._engine.close()

    def _close_answering(self) -> None:
        if self.answering is not None:
            self.answering.close()

    def _get_engine(self) -> EngineClient:
        if self._engine is None:
            self._engine = self._engine_factory()
        return self._engine
