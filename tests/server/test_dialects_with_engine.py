"""Ollama's and Anthropic's clients over a real engine and small models that say what is known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import anthropic
import ollama
import pytest

from app.engine.client import EngineClient
from app.server.serving import ServerOptions, ServerThread

from .conftest import FurnishedModels

TOOL: Any = {
    "name": "look_up",
    "description": "Finds things.",
    "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}},
}
FUNCTION: Any = {
    "type": "function",
    "function": {"name": "look_up", "description": "", "parameters": TOOL["input_schema"]},
}
ASK: Any = [{"role": "user", "content": "Hi"}]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def url(furnished_models: FurnishedModels) -> Iterator[str]:
    """The server over a real engine."""
    thread = ServerThread(EngineClient, ServerOptions(port=0), models=furnished_models)
    thread.start()
    yield thread.url
    thread.stop()


@pytest.fixture
def client(url: str) -> Iterator[ollama.Client]:
    with ollama.Client(url) as client:
        yield client


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


def test_thoughts_and_calls_of_ollama(client: ollama.Client) -> None:
    whole = client.chat("thinker", ASK, tools=[FUNCTION], think=True, options=GREEDY)
    assert (whole.message.thinking, whole.message.content) == ("Hmm.", "Let me look.")
    (call,) = whole.message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("look_up", {"q": "one"})
    parts = list(client.chat("thinker", ASK, tools=[FUNCTION], options=GREEDY, stream=True))
    said = [part.message for part in parts]
    assert "".join(one.thinking or "" for one in said) == "Hmm."
    assert "".join(one.content or "" for one in said) == "Let me look."
    assert [one.tool_calls for one in said if one.tool_calls] == [whole.message.tool_calls]
    assert (
        parts[-1].done_reason == "stop" and parts[-1].prompt_eval_count == whole.prompt_eval_count
    )


def test_a_schema_is_kept(client: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2, 3]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    answer = client.chat("tiny", ASK, format=schema, options={"seed": 3, "num_predict": 200})
    said = json.loads(answer.message.content or "")
    assert said.keys() == {"a", "b"} and said["a"] in (1, 2, 3)


def test_loaded_shown_and_unloaded(client: ollama.Client) -> None:
    assert client.generate("tiny", keep_alive="1h").done_reason == "load"
    (one,) = client.ps().models
    assert one.name == "tiny" and one.context_length == 512 and one.size
    assert one.expires_at is not None
    assert 3000 < (one.expires_at - datetime.now(UTC)).total_seconds() <= 3600
    assert client.generate("tiny", keep_alive=0).done_reason == "unload"
    while client.ps().models:
        pass  # it is on its way out
    assert client.generate("tiny", keep_alive=0).done_reason == "unload"
    assert client.ps().models == []


def test_raw_prompts_and_logprobs(client: ollama.Client) -> None:
    answer = client.generate(
        "tiny", "Once", raw=True, logprobs=True, top_logprobs=2, options={"num_predict": 3}
    )
    assert answer.eval_count == 3 and answer.done_reason == "length"
    assert answer.logprobs is not None and len(answer.logprobs) == 3
    assert all(len(one.top_logprobs or []) == 2 for one in answer.logprobs)


def test_tools_that_a_model_cannot_be_told_of(client: ollama.Client) -> None:
    assert "tools" not in (client.show("tiny").capabilities or [])
    with pytest.raises(ollama.ResponseError, match="has no tools"):
        client.chat("tiny", ASK, tools=[FUNCTION])


def test_thoughts_and_calls_of_anthropic(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": "thinker", "max_tokens": 100, "messages": ASK, "extra_body": GREEDY}
    whole = claude.messages.create(tools=[TOOL], **asked)
    with claude.messages.stream(tools=[TOOL], **asked) as stream:
        streamed = stream.get_final_message()
    thought, text, call = whole.content
    assert thought.type == "thinking" and thought.thinking == "Hmm."
    assert text.type == "text" and text.text == "Let me look."
    assert call.type == "tool_use" and (call.name, call.input) == ("look_up", {"q": "one"})
    assert whole.stop_reason == streamed.stop_reason == "tool_use"
    assert [block.type for block in streamed.content] == [block.type for block in whole.content]
    # The second prompt was the first one's: all of it but its last token came from the cache.
    assert streamed.usage.cache_read_input_tokens
    total = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert streamed.usage.input_tokens + streamed.usage.cache_read_input_tokens == total


def test_tokens_are_counted_as_they_are_read(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": "thinker", "messages": ASK, "tools": [TOOL], "system": "Be brief."}
    answer = claude.messages.create(max_tokens=1, **asked)
    read = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert claude.messages.count_tokens(**asked).input_tokens == read


def test_embeddings_of_ollama(client: ollama.Client) -> None:
    whole = client.embed("tiny", ["Hi", "Hi there"])
    one, other = whole.embeddings
    assert math.hypot(*one) == pytest.approx(1) and list(one) != list(other)
    cut = list(client.embed("tiny", "Hi", dimensions=4).embeddings[0])
    length = math.hypot(*one[:4])
    assert cut == pytest.approx([number / length for number in one[:4]])


def test_the_sequence_that_stopped_it(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": "thinker", "max_tokens": 100, "messages": ASK, "extra_body": GREEDY}
    stopped = claude.messages.create(stop_sequences=["nowhere", " look"], **asked)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " look")
    assert stopped.content[-1].type == "text" and stopped.content[-1].text == "Let me"
    cut = claude.messages.create(**(asked | {"max_tokens": 2}))
    assert (cut.stop_reason, cut.stop_sequence) == ("max_tokens", None)


def test_a_line_that_changes_does_not_cost_the_cache(claude: anthropic.Anthropic) -> None:
    def cached(nonce: str) -> int:
        line = f"x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch={nonce};"
        system: Any = [{"type": "text", "text": text} for text in (line, "You help. " * 20)]
        answer = claude.messages.create(model="tiny", max_tokens=1, system=system, messages=ASK)
        return answer.usage.cache_read_input_tokens or 0

    assert cached("0aaa9") < 10
    assert cached("36ee5") > 200
