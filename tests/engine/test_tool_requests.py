"""Tools and reasoning through the whole engine: client, process, scheduler, a model that always
writes the same answer."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from app.engine.chat_prompt import BASE_MODEL, SYSTEM_FOLDED
from app.engine.client import EngineClient
from app.engine.protocol import (
    Accepted,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Message,
    ModelRef,
    Sampling,
    Token,
    Tool,
    ToolCall,
    ToolCallPart,
)

from ..tiny_models import write_scripted_model
from .test_chat_prompt import GEMMA, MISTRAL, QWEN3

TOOL = Tool("look_up", "Finds things.", {"type": "object", "properties": {"q": {"type": "string"}}})
PIECES = [
    "<think>", "\nHm", "m.", "\n</think>\n\n", "Let me ", "look. ", "<tool_call>",
    '\n{"name": "look', '_up", "arguments": {"q": "one', ' END two"}}', "\n</tool_call>", "\nDone",
    " soon END", " later",
]  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    root = tmp_path_factory.mktemp("scripted")
    written = {
        "qwen": write_scripted_model(root / "qwen", PIECES, template=QWEN3),
        "special": write_scripted_model(
            root / "special",
            ["Well ", "[TOOL_CALLS]", "look_up", "[ARGS]", '{"q": "é', '"}'],
            specials=("[TOOL_CALLS]", "[ARGS]"),
            template=MISTRAL,
        ),
        "gemma": write_scripted_model(root / "gemma", ["Hello", " there"], template=GEMMA),
        "base": write_scripted_model(root / "base", ["Hello", " there"], template=""),
    }
    (written["base"] / "tokenizer_config.json").unlink()
    return {name: ModelRef(name, str(path)) for name, path in written.items()}


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[EngineClient]:
    """One engine for all, in the home of the first test."""
    client = EngineClient()
    yield client
    await client.close()


async def ask(client: EngineClient, model: ModelRef, **fields: Any) -> list[Event]:
    given = {"messages": [Message("user", "Hi")], "sampling": Sampling(temperature=0)}
    request = GenerationRequest(id="r", model=model, **(given | fields))
    return [event async for event in client.stream(request)]


def text(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, (Token, Finished)))


def reasoning(events: list[Event]) -> str:
    return "".join(e.reasoning for e in events if isinstance(e, (Token, Finished)))


def calls(events: list[Event]) -> list[ToolCall]:
    return [e for e in events if isinstance(e, ToolCall)]


async def test_reasoning_calls_and_text_come_apart(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    events = await ask(client, models["qwen"], tools=[TOOL])
    assert reasoning(events) == "Hmm."
    assert text(events) == "Let me look.Done soon END later"
    (call,) = calls(events)
    assert (call.name, json.loads(call.arguments)) == ("look_up", {"q": "one END two"})
    assert re.fullmatch("call_[0-9a-f]{24}", call.call_id)
    finished = events[-1]
    assert isinstance(finished, Finished) and finished.reason == "tool_calls"
    # Every token counts, and the call comes between the text before and after it.
    assert finished.usage.completion_tokens == len(PIECES)
    at = events.index(call)
    assert text(events[:at]) == "Let me look."

    again = await ask(client, models["qwen"], tools=[TOOL])
    assert calls(again)[0].call_id != call.call_id


async def test_a_stop_string_ends_the_text_and_no_call(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    events = await ask(client, models["qwen"], tools=[TOOL], stop=["END", "Hm"])
    assert len(calls(events)) == 1 and reasoning(events) == "Hmm."
    assert text(events) == "Let me look.Done soon "
    assert isinstance(events[-1], Finished) and events[-1].reason == "tool_calls"


async def test_without_tools_a_call_is_text(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        events = await ask(client, models["qwen"], **fields)
        assert not calls(events) and "<tool_call>" in text(events)
        assert isinstance(events[-1], Finished) and events[-1].reason == "stop"


async def test_a_call_that_is_cut_off_is_text_and_length(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    events = await ask(client, models["qwen"], tools=[TOOL], max_tokens=9)
    assert not calls(events)
    assert text(events) == "Let me " + "".join(PIECES[5:9])
    assert isinstance(events[-1], Finished) and events[-1].reason == "length"


async def test_markers_that_are_special_tokens_are_seen_and_never_shown(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    events = await ask(client, models["special"], tools=[TOOL])
    assert [(call.name, call.arguments) for call in calls(events)] == [("look_up", '{"q": "é"}')]
    assert text(events) == "Well"
    plain = await ask(client, models["special"])
    assert text(plain) == 'Well look_up{"q": "é"}'


async def test_a_row_beside_others_says_what_it_says_alone(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    async def one(id: str, tools: list[Tool]) -> list[Event]:
        request = GenerationRequest(
            id=id,
            model=models["qwen"],
            messages=[Message("user", id)],
            sampling=Sampling(temperature=0),
            tools=tools,
        )
        return [event async for event in client.stream(request)]

    answers = await asyncio.gather(*(one(f"r{i}", [TOOL] if i % 2 else []) for i in range(6)))
    for i, events in enumerate(answers):
        assert len(calls(events)) == i % 2
        assert ("<tool_call>" in text(events)) == (i % 2 == 0)


async def test_what_the_prompt_became_is_told(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    system = [Message("system", "Be brief."), Message("user", "Hi")]
    for name, notice in [("gemma", SYSTEM_FOLDED), ("base", BASE_MODEL), ("qwen", "")]:
        events = await ask(client, models[name], messages=system)
        (accepted,) = [e for e in events if isinstance(e, Accepted)]
        assert accepted.notice == notice


async def test_tools_that_a_model_cannot_use_are_refused_by_name(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    for name in ("gemma", "base"):
        events = await ask(client, models[name], tools=[TOOL])
        assert isinstance(events[-1], Failed) and events[-1].code == "invalid_request"
        assert "tools" in events[-1].message


async def test_a_turn_after_a_call_continues_from_the_prompt_before_it(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    question = [Message("system", "You look things up."), Message("user", "Hi " * 40)]
    first = await ask(client, models["qwen"], messages=question, tools=[TOOL])
    (call,) = calls(first)
    part = ToolCallPart(call.call_id, call.name, call.arguments)
    answer = Message("assistant", "Let me look.", reasoning=reasoning(first), tool_calls=[part])
    result = Message("tool", "42", tool_call_id=call.call_id)
    second = await ask(client, models["qwen"], messages=[*question, answer, result], tools=[TOOL])
    before, after = ([e for e in s if isinstance(e, Accepted)][0] for s in (first, second))
    # All but the prompt's last words, which open the answer.
    assert after.cached_tokens >= before.prompt_tokens - len("<|im_start|>assistant\n")
