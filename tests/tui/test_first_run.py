"""An empty machine: a model is offered, downloaded and used without leaving the chat."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from app.errors import GryphonError
from app.tui.ports import ModelOffer, PullProgress

from .conftest import MODEL

Chat = Callable[..., Any]


def _offer(pull: Callable[[PullProgress], Any]) -> ModelOffer:
    return ModelOffer("SmolLM2-135M-Instruct", "93 MB", pull)


async def test_the_model_is_pulled_while_the_person_types(chatting: Chat) -> None:
    go_on = threading.Event()

    def pull(progress: PullProgress) -> Any:
        progress("downloading", 31_000_000, 93_000_000)
        assert go_on.wait(60)
        progress("converting", 0, 0)
        return MODEL

    async with chatting([["Hello!"]], model=None, offer=_offer(pull)) as chat:
        await chat.until_seen("SmolLM2-135M-Instruct (93 MB)")
        assert chat.status == "no model"
        await chat.pilot.press("enter")
        await chat.until_seen("downloading 31 of 93 MB")
        await chat.until_seen("33%")
        await chat.send("Hi, are you there?")
        await chat.until_seen("Downloading · your text stays")
        assert chat.status == "downloading"
        go_on.set()
        await chat.until_seen("tiny-model is ready")
        assert chat.prompt.text == "Hi, are you there?"
        await chat.pilot.press("enter")
        await chat.until_seen("Hello!")


async def test_a_failed_pull_is_one_sentence_and_can_be_tried_again(chatting: Chat) -> None:
    attempts = []

    def pull(progress: PullProgress) -> Any:
        attempts.append(1)
        if len(attempts) == 1:
            raise GryphonError("network", "The registry did not answer. Check the network.")
        return MODEL

    async with chatting(model=None, offer=_offer(pull)) as chat:
        await chat.until_seen("Download it")
        await chat.pilot.press("enter")
        await chat.until_seen("The registry did not answer. Check the network.")
        await chat.send("y")
        await chat.until_seen("tiny-model is ready")
        assert chat.prompt.text == ""


async def test_escape_cancels_a_pull(chatting: Chat) -> None:
    stepping = threading.Event()

    def pull(progress: PullProgress) -> Any:
        while True:
            progress("downloading", 1, 100)
            stepping.wait(0.01)

    async with chatting(model=None, offer=_offer(pull)) as chat:
        await chat.until_seen("Download it")
        await chat.pilot.press("enter")
        await chat.until_seen("Esc cancels")
        await chat.pilot.press("escape")
        await chat.until_seen("The download was cancelled.")
        assert chat.status == "no model"


async def test_quitting_does_not_wait_for_a_stalled_pull(chatting: Chat) -> None:
    stalled = threading.Event()

    def pull(progress: PullProgress) -> Any:
        stalled.wait(60)
        return MODEL

    async with chatting(model=None, offer=_offer(pull)) as chat:
        await chat.until_seen("Download it")
        await chat.pilot.press("enter")
        await chat.until(lambda: chat.status == "downloading", "a download")
        await chat.pilot.press("ctrl+q")
    stalled.set()


async def test_a_message_typed_before_there_is_a_model_stays(chatting: Chat) -> None:
    async with chatting(model=None, offer=_offer(lambda progress: MODEL)) as chat:
        await chat.until_seen("Download it")
        await chat.send("Hello")
        await chat.until_seen("No model: clear this, press Enter")
        assert chat.prompt.text == "Hello"


async def test_without_an_offer_the_command_is_named(chatting: Chat) -> None:
    async with chatting(model=None) as chat:
        await chat.until_seen("gryphon pull smollm2-135m")
        await chat.pilot.press("enter")
        assert chat.status == "no model"
