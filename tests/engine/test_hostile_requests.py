"""Requests, and models, made to break the engine: each ends once, the others go on."""

from __future__ import annotations

import asyncio
import json
import struct
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app import paths
from app.engine.client import EngineClient
from app.engine.constraint import Constraint, check_constraint
from app.engine.protocol import (
    MAX_REQUEST_ID,
    Cancel,
    Event,
    Failed,
    Finished,
    ForgetChat,
    GenerationRequest,
    GetStatus,
    LoadModel,
    Message,
    ModelRef,
    Token,
    encode_frame,
    read_event,
)
from app.errors import GryphonError

from ..tiny_models import OPEN_LLAMA, write_model


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient()
    yield client
    await client.close()


@pytest.fixture
def model(tmp_path: Path) -> ModelRef:
    return ModelRef("tiny", str(write_model(tmp_path / "tiny", OPEN_LLAMA)))


async def end_of(client: EngineClient, request: GenerationRequest) -> Event:
    async with asyncio.timeout(30):
        events = [event async for event in client.stream(request)]
    assert sum(isinstance(event, (Finished, Failed)) for event in events) == 1
    return events[-1]


async def test_what_a_models_files_say_never_keeps_a_request_from_its_end(
    client: EngineClient, model: ModelRef
) -> None:
    index = Path(model.path) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "\ud800\x1b[2J.safetensors"}}))
    end = await end_of(client, GenerationRequest(id="r", model=model, prompt_tokens=[1]))
    assert isinstance(end, Failed) and end.code == "invalid_model"
    assert "\\ud800␛[2J.safetensors" in end.message


async def test_a_template_that_fails_with_the_whole_prompt_shows_the_beginning_and_logs_none(
    client: EngineClient, model: ModelRef
) -> None:
    template = "{{ raise_exception(messages[0].content * 10000) }}"
    (Path(model.path) / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    said = [Message("user", "secret words " * 1000)]
    end = await end_of(client, GenerationRequest(id="r", model=model, messages=said))
    assert isinstance(end, Failed) and end.code == "template_error" and len(end.message) < 1000
    assert "secret" not in paths.engine_log().read_text()


async def test_a_purge_with_the_id_of_a_request_is_refused_and_ends_neither(
    client: EngineClient, model: ModelRef
) -> None:
    await client.start()
    reader, writer = await asyncio.open_unix_connection(paths.engine_socket())
    request = GenerationRequest(
        id="r", model=model, prompt_tokens=[1], ignore_eos=True, max_tokens=500
    )
    try:
        async with asyncio.timeout(60):
            writer.write(encode_frame(request))
            while not isinstance(await read_event(reader), Token):
                pass
            writer.write(encode_frame(ForgetChat("r", "")) + encode_frame(Cancel("r")))
            ends = []
            while len(ends) < 2:
                event = await read_event(reader)
                ends += [event] if isinstance(event, (Finished, Failed)) else []
        assert isinstance(ends[0], Failed) and "running already" in ends[0].message
        assert isinstance(ends[1], Finished) and ends[1].reason == "cancelled"
        writer.write(encode_frame(ForgetChat("r", "")))
        assert isinstance(await read_event(reader), Finished)
    finally:
        writer.close()


async def test_an_id_without_end_is_refused_and_the_others_of_its_client_go_on(
    client: EngineClient, model: ModelRef
) -> None:
    request = GenerationRequest(id="r", model=model, prompt_tokens=[1], max_tokens=400)
    running = asyncio.create_task(end_of(client, request))
    long = GenerationRequest(id="i" * (MAX_REQUEST_ID + 1), model=model, prompt_tokens=[1])
    end = await end_of(client, long)
    assert isinstance(end, Failed) and "id of a request" in end.message
    assert isinstance(await running, Finished)
    # Whoever is no client of ours is let go of.
    reader, writer = await asyncio.open_unix_connection(paths.engine_socket())
    await read_event(reader)
    writer.write(encode_frame(GetStatus("i" * 1_000_000)))
    assert await reader.read() == b""
    writer.close()


async def test_a_load_of_what_names_no_directory_is_refused(
    client: EngineClient, model: ModelRef
) -> None:
    await client.start()
    reader, writer = await asyncio.open_unix_connection(paths.engine_socket())
    writer.write(encode_frame(LoadModel("r", ModelRef("m", "a\0b"))))
    async with asyncio.timeout(30):
        while not isinstance(event := await read_event(reader), Failed):
            pass
    assert event.code == "invalid_request"
    writer.close()


def test_the_memory_for_checking_a_schema_is_a_multiple_of_its_size() -> None:
    """A long name, and many schemas below it: each of their places would hold it."""
    many = {"anyOf": [{}] * 40_000}
    text = json.dumps({"properties": {"k" * 130_000: many}}, separators=(",", ":"))
    tracemalloc.start()
    try:
        check_constraint(Constraint("json_schema", text))
        assert tracemalloc.get_traced_memory()[1] < 200 * len(text)
    finally:
        tracemalloc.stop()


def test_the_message_about_a_schema_is_short() -> None:
    text = json.dumps({"properties": {"p" * 90_000: {"k" * 90_000: 1}}})
    with pytest.raises(GryphonError, match="cannot be enforced") as caught:
        check_constraint(Constraint("json_schema", text))
    assert len(caught.value.message) < 500


def test_an_error_can_be_sent_and_shown_whatever_it_quotes() -> None:
    error = GryphonError("invalid_model", "a\ud800b\x1b]0;c\x07\x9b2J\n" + "x" * 10_000)
    assert error.message.startswith("a\\ud800b␛]0;c␇\ufffd2J\nxxx") and len(error.message) < 5000
    assert str(error) == error.message
    failed = Failed("r", error.code, error.message)
    assert struct.unpack(">I", encode_frame(failed)[:4])[0] < 10_000
