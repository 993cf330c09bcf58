"""The chat: transcript, prompt and status bar around one session."""

from __future__ import annotations

import asyncio
import contextlib
from typing import ClassVar

from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import TextArea

from app.errors import GryphonError
from app.tui.answering import Answering
from app.tui.background import in_daemon_thread
from app.tui.pace import Pace
from app.tui.ports import ModelOffer, PullCancelled, Server
from app.tui.screens.help import HelpScreen
from app.tui.session import Session
from app.tui.widgets.message import AnswerMessage
from app.tui.widgets.model_offer import ModelOfferPanel
from app.tui.widgets.prompt import Prompt
from app.tui.widgets.status_bar import Status, StatusBar
from app.tui.widgets.too_small import MIN_HEIGHT, MIN_WIDTH, TooSmall
from app.tui.widgets.transcript import Notice, Transcript, turn

DRAFT_SAVE_S = 0.4


class ChatScreen(Screen[None]):
    """Everything slow starts after the first paint, and nothing it does stops people typing."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop the answer"),
        Binding("ctrl+n", "new_chat", "New chat"),
        Binding("ctrl+r,r", "retry", "Retry"),
        Binding("f1,question_mark", "help", "Help"),
    ]

    def __init__(
        self, session: Session, *, offer: ModelOffer | None = None, server: Server | None = None
    ) -> None:
        super().__init__()
        self.session = session
        self._offer = offer
        self._server = server
        self._rest = ""
        self._draft_timer: Timer | None = None
        self._pull_unwanted = False
        self._is_pulling = False
        self._has_begun = False
        self._sent_early = False

    def compose(self) -> ComposeResult:
        yield Transcript()
        yield Prompt()
        yield StatusBar()
        yield TooSmall()

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    @property
    def prompt(self) -> Prompt:
        return self.query_one(Prompt)

    def on_mount(self) -> None:
        self.prompt.focus()
        self._show_status()
        self.call_after_refresh(self._begin)

    def on_resize(self, event: events.Resize) -> None:
        width, height = event.size
        self.set_class(width < MIN_WIDTH or height < MIN_HEIGHT, "-too-small")

    async def _begin(self) -> None:
        """After the first paint: the last chat, the model, the endpoint."""
        is_last = True
        try:
            is_last = self.session.chat.resume()
        except GryphonError as error:
            self._trouble(error)
        await self._show_chat()
        if notice := self.session.chat.history.notice:
            self._tell(notice, is_error=True)
        if not is_last:
            which = "an earlier one" if self.session.chat.path else "a new one"
            await self.transcript.add(
                Notice(f"Your last chat is open in another Gryphon; this is {which}.")
            )
        typed_already = self.prompt.text
        self._put_in_prompt(self.session.chat.draft + typed_already)
        self._has_begun = True
        if self._sent_early and not self.session.chat.draft:
            self.prompt.post_message(Prompt.Submitted(self.prompt, typed_already))
        if self.session.model is not None:
            self._load_model()
        if self._server is not None:
            self._start_server(self._server)

    async def _show_chat(self) -> None:
        chat = self.session.chat
        if chat.path:
            await self.transcript.show(chat.path)
            if chat.path[-1].role == "user":
                await self.transcript.add(Notice("Not answered yet · Ctrl+R to ask again"))
        if self.session.model is None:
            await self.transcript.add(ModelOfferPanel(self._offer))
        self._show_status()

    @on(Prompt.Submitted)
    async def send(self, event: Prompt.Submitted) -> None:
        if not self._has_begun:
            self._sent_early = True
            return
        text = event.text.strip("\n")
        if self.session.model is None:
            if self._is_pulling:
                self.prompt.hint("Downloading · your text stays")
            elif text.strip().lower() in ("", "y", "yes"):
                self._put_in_prompt("")
                self.accept_offer()
            else:
                self.prompt.hint("No model: clear this, press Enter")
            return
        if not text.strip():
            return
        if self.session.is_answering:
            self.prompt.hint("Answer still coming · Esc stops it")
            return
        try:
            message = self.session.chat.say(text)
        except GryphonError as error:
            self._trouble(error)
            return
        self._put_in_prompt("")
        await self.transcript.query(Notice).remove()
        await self.transcript.add(turn(message))
        await self._answer()

    async def action_retry(self) -> None:
        """Ask the last question again; without one, try again to load the model."""
        if not self._has_begun or self.session.model is None or self.session.is_answering:
            return
        await self.transcript.query(Notice).remove()
        if self.session.chat.path:
            self.workers.cancel_group(self, "paint")
            await self.transcript.remove_last_answer()
            await self._answer()
        elif self.session.load_error:
            self._load_model()

    async def _answer(self) -> None:
        try:
            answering = self.session.answer(self._trouble)
        except GryphonError as error:
            self._trouble(error)
            return
        widget = turn(answering.row)
        assert isinstance(widget, AnswerMessage)
        await self.transcript.add(widget)
        self._follow(answering, widget)

    @work(group="paint")
    async def _follow(self, answering: Answering, widget: AnswerMessage) -> None:
        """Paint an answer as it comes, no faster than painting can be afforded."""
        pace = Pace()
        shown = await self._paint(answering, widget, (0, 0))
        while not answering.ended.is_set():
            await answering.changed.wait()
            answering.changed.clear()
            shown = await self._paint(answering, widget, shown)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(answering.ended.wait(), pace.next_interval())
        await self._paint(answering, widget, shown)
        widget.finish(answering.row)
        if answering.notice:
            self._tell(answering.notice)
        self._show_status()
        await self.session.settled()

    async def _paint(
        self, answering: Answering, widget: AnswerMessage, shown: tuple[int, int]
    ) -> tuple[int, int]:
        text, reasoning = answering.text, answering.reasoning
        widget.show_activity("" if text else answering.activity)
        if len(reasoning) > shown[1]:
            widget.show_thinking(reasoning)
        await widget.add(text[shown[0] :])
        self._show_status()
        return len(text), len(reasoning)

    async def action_stop(self) -> None:
        """Stop what is going on: first ask the engine, when asked again stop waiting for it."""
        if self._is_pulling:
            self._pull_unwanted = True
        elif not self.session.is_answering:
            self.prompt.focus()
        elif self.session.answering and self.session.answering.stop_asked:
            await self.session.drop_answer()
        else:
            await self.session.cancel()
            self._show_status()

    async def action_new_chat(self) -> None:
        """Leave this chat for an empty one. What is typed comes along."""
        if not self._has_begun:
            return
        self.workers.cancel_group(self, "paint")
        try:
            await self.session.start_new_chat()
        except GryphonError as error:
            self._trouble(error)
            return
        await self.transcript.show([])
        await self._show_chat()
        self._save_draft_soon()
        self.prompt.focus()

    @work(exclusive=True, group="load")
    async def _load_model(self) -> None:
        await self.session.load_model(self._show_status)
        if self.session.load_error:
            sentence = f"{self.session.load_error}\nCtrl+R to try again"
            await self.transcript.add(Notice(sentence, is_error=True))

    @work(group="server")
    async def _start_server(self, server: Server) -> None:
        try:
            await in_daemon_thread(server.start)
            self._rest = server.url
        except GryphonError as error:
            self._rest = "REST off"
            self.query_one(StatusBar).tooltip = error.message
            await self.transcript.add(Notice(f"The REST endpoint is off. {error.message}"))
        self._show_status()

    @on(ModelOfferPanel.Accepted)
    def accept_offer(self) -> None:
        if self._offer is not None and not self._is_pulling:
            self._is_pulling, self._pull_unwanted = True, False
            self.prompt.focus()
            self._show_status()
            self._pull(self._offer)

    @work(group="pull")
    async def _pull(self, offer: ModelOffer) -> None:
        panel = self.query_one(ModelOfferPanel)
        loop = asyncio.get_running_loop()
        panel.show_progress("starting the download", 0, 0)

        def progress(doing: str, done: int, total: int) -> None:
            if self._pull_unwanted:
                raise PullCancelled
            with contextlib.suppress(RuntimeError):  # The loop is closed: the app has ended.
                loop.call_soon_threadsafe(panel.show_progress, doing, done, total)

        try:
            model = await in_daemon_thread(lambda: offer.pull(progress))
        except PullCancelled:
            panel.show_error("The download was cancelled.")
        except GryphonError as error:
            panel.show_error(error.message)
        else:
            self.session.model = model
            await panel.remove()
            await self.transcript.add(Notice(f"{model.name} is ready. Say something."))
            self._load_model()
        self._is_pulling = False
        self.prompt.hint("")
        self._show_status()

    @on(TextArea.Changed, "#prompt")
    def _save_draft_soon(self) -> None:
        self.session.typed = self.prompt.text
        if self._draft_timer is not None:
            self._draft_timer.stop()
        self._draft_timer = self.set_timer(DRAFT_SAVE_S, self._save_draft)

    def _save_draft(self) -> None:
        if not self._has_begun:
            return
        try:
            self.session.chat.save_draft(self.session.typed)
        except GryphonError as error:
            self._trouble(error)

    def _put_in_prompt(self, text: str) -> None:
        self.prompt.load_text(text)
        self.prompt.move_cursor(self.prompt.document.end)

    def _trouble(self, error: GryphonError) -> None:
        """Say what went wrong, once, below the conversation; what is on screen stays."""
        self._tell(error.message, is_error=True)

    def _tell(self, text: str, *, is_error: bool = False) -> None:
        if all(notice.text != text for notice in self.transcript.query(Notice)):
            self.transcript.mount(Notice(text, is_error=is_error))

    def _show_status(self) -> None:
        session = self.session
        used, limit = session.context
        self.query_one(StatusBar).status = Status(
            model=session.model.name if session.model else "",
            state="downloading" if self._is_pulling else session.state,
            tps=session.answering.tps if session.answering else 0.0,
            context_used=used,
            context_limit=limit,
            rest=self._rest,
        )

    def action_help(self) -> None:
        self.app.push_screen(HelpScreen())

    def action_scroll_transcript(self, pages: int) -> None:
        if pages < 0:
            self.transcript.scroll_page_up()
        else:
            self.transcript.scroll_page_down()
