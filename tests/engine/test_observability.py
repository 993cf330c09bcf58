"""What the engine tells about its requests: who, how much, how long, how it ended. Never the words.

A real engine process behind the real client.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator

import msgspec
import pytest

from app import paths
from app.engine.client import EngineClient
from app.engine.ledger import Ledger, line
from app.engine.protocol import (
    Accepted,
    EngineStatus,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    LoadModel,
    Message,
    ModelRef,
    Progress,
    Sampling,
    Timings,
    Token,
    Usage,
)

from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
REFUSING = "{{ raise_exception('I do not like: ' + messages[0].content) }}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    root = tmp_path_factory.mktemp("observed")
    models = {}
    for name, config, template in (
        ("tiny", OPEN_LLAMA, None),
        ("endless", RECURRENT_GEMMA, None),
        ("looping", OPEN_LLAMA, LOOP),
        ("refusing", OPEN_LLAMA, REFUSING),
    ):
        path = write_model(root / name, config)
        if template is not None:
            (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        models[name] = ModelRef(name, str(path))
    return models


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient()
    yield client
    await client.close()


def request(model: ModelRef, id: str, text: str = "Hello", **fields: object) -> GenerationRequest:
    values: dict[str, object] = {
        "messages": [Message("user", text)],
        "sampling": Sampling(temperature=0),
        "max_tokens": 8,
    }
    return GenerationRequest(id=id, model=model, **(values | fields))  # type: ignore[arg-type]


async def collect(stream: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in stream]


async def status_of(client: EngineClient) -> EngineStatus:
    status = await client.status()
    assert status is not None and status.counters is not None
    return status


async def test_status_lists_the_requests_under_way_and_none_that_ended(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    await collect(client.stream(request(models["tiny"], "ended")))
    running = client.stream(request(models["endless"], "runs", client="me", max_tokens=10**6))
    given = 0
    while given < 3:
        given += isinstance(await anext(running), Token)
    waits = client.stream(request(models["tiny"], "waits"))
    swap = await anext(waits)
    assert isinstance(swap, Progress) and swap.phase == "swap"
    looping = asyncio.create_task(collect(client.stream(request(models["looping"], "loops"))))
    status = await status_of(client)
    while len(status.requests) < 3:
        status = await status_of(client)
    runs, waiting, loops = status.requests
    assert (runs.id, runs.client, runs.model, runs.phase) == ("runs", "me", "endless", "decode")
    assert runs.prompt_tokens == 24 and runs.generated_tokens >= 3 and runs.seconds > 0
    assert (waiting.id, waiting.client, waiting.phase) == ("waits", "connection 1", "queued")
    assert (waiting.prompt_tokens, waiting.generated_tokens) == (0, 0)
    assert (loops.id, loops.phase) == ("loops", "preparing")
    assert "Hello" not in repr(status)
    await client.cancel("loops")
    await looping
    await running.aclose()  # type: ignore[attr-defined]
    assert isinstance((await collect(waits))[-1], Finished)
    assert (await status_of(client)).requests == []


async def test_counters_are_the_sums_of_what_the_requests_were_told(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    tiny = models["tiny"]
    events: list[list[Event]] = []
    for i in range(3):
        events.append(await collect(client.stream(request(tiny, f"{i}", max_tokens=4 + i))))
    together = [request(tiny, f"t{i}", "together " * i) for i in range(3)]
    events += await asyncio.gather(*(collect(client.stream(one)) for one in together))
    events.append(await collect(client.stream(request(tiny, "long", "x" * 600))))
    events.append(await collect(client.stream(request(tiny, "bad", max_tokens=0))))
    events.append(await collect(client.stream(request(models["refusing"], "refused"))))
    cancelled = client.stream(request(models["endless"], "cancelled", max_tokens=10**6))
    events.append([])
    async for event in cancelled:
        events[-1].append(event)
        if isinstance(event, Token):
            await client.cancel("cancelled")
    await collect(client.load(tiny))  # a load is not a request for text

    status = await status_of(client)
    counters = status.counters
    assert counters is not None
    everything = [event for told in events for event in told]
    ends = [told[-1] for told in events]
    usages = [end.usage for end in ends if isinstance(end, Finished)]
    tokens = sum(isinstance(event, Token) for event in everything)
    firsts = sum(any(isinstance(event, Token) for event in told) for told in events)
    assert counters.finished == {"length": 6, "cancelled": 1}
    assert counters.failed == {
        "context_length_exceeded": 1, "invalid_request": 1, "template_error": 1,
    }  # fmt: skip
    assert counters.prompt_tokens == sum(usage.prompt_tokens for usage in usages)
    assert counters.cached_tokens == sum(usage.cached_tokens for usage in usages) > 0
    assert counters.generated_tokens == sum(usage.completion_tokens for usage in usages) == tokens
    assert counters.model_loads == 3
    for histogram, count in (
        (counters.queue_s, 7),
        (counters.first_token_s, firsts),
        (counters.between_tokens_s, tokens - firsts),
        (counters.request_s, 7),
    ):
        assert sum(histogram.counts) == count
        assert len(histogram.counts) == len(histogram.bounds) + 1
        assert histogram.bounds == sorted(set(histogram.bounds))
        assert histogram.sum > 0
    # The engine's own figures lie within those of the events that it sent.
    engine_s = sum(
        end.timings.queue_s + end.timings.prefill_s + end.timings.decode_s
        for end in ends
        if isinstance(end, Finished)
    )
    assert counters.request_s.sum == pytest.approx(engine_s, abs=1.0)
    # What a second client sees is the same engine.
    other = EngineClient()
    try:
        seen = (await status_of(other)).counters
        assert seen is not None
        assert seen == counters
    finally:
        await other.close()


async def test_requests_of_a_client_that_leaves_are_ended_and_counted(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    await client.start()
    other = EngineClient()
    stream = other.stream(request(models["endless"], "a", max_tokens=10**6))
    while not isinstance(await anext(stream), Token):
        pass
    assert [one.id for one in (await status_of(client)).requests] == ["a"]
    await other.close()
    async for _ in stream:
        pass
    status = await status_of(client)
    while status.requests:
        status = await status_of(client)
    assert status.counters is not None and status.counters.finished == {"cancelled": 1}


async def test_the_client_counts_starts_and_crashes(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    assert (client.starts, client.crashes) == (0, 0)
    stream = client.stream(request(models["endless"], "a", max_tokens=10**6))
    while not isinstance(await anext(stream), Token):
        pass
    assert (client.starts, client.crashes) == (1, 0)
    os.kill((await status_of(client)).pid, signal.SIGKILL)
    end = [event async for event in stream][-1]
    assert isinstance(end, Failed) and end.code == "engine_crashed"
    assert (client.starts, client.crashes) == (1, 1)
    await collect(client.stream(request(models["tiny"], "b")))
    assert (client.starts, client.crashes) == (2, 1)
    counters = (await status_of(client)).counters
    assert counters is not None and counters.finished == {"length": 1}  # its own


async def test_the_log_tells_how_each_request_ended_and_no_word_of_it(
    models: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRYPHON_LOG", "debug")
    monkeypatch.setenv("GRYPHON_PROMPT_TIME_LIMIT", "1")
    client = EngineClient()
    secret, echo = "Zanzibar", Sampling(temperature=0, logit_bias={33: 100})  # says BBBB...
    requests = [
        request(models["tiny"], "answered", f"{secret} is where?", client="me", sampling=echo),
        request(models["tiny"], "raw", messages=None, prompt=f"{secret} " * 3, sampling=echo),
        request(models["tiny"], "long", f"{secret} " * 100),
        request(models["tiny"], "invalid", secret, sampling=Sampling(temperature=9)),
        request(models["tiny"], "stops", secret, stop=[secret]),
        request(models["refusing"], "refused", secret),
        request(models["looping"], "loops", secret),
        request(ModelRef("gone", "/nowhere"), "gone", messages=None, prompt_tokens=[1]),
        request(models["tiny"], 'forged"\nrequest ended id="x', secret),
    ]
    answers: dict[str, str] = {}
    ends: dict[str, Event] = {}
    for asked in requests:
        events = await collect(client.stream(asked))
        answers[asked.id] = "".join(event.text for event in events if isinstance(event, Token))
        ends[asked.id] = events[-1]
    dropped = client.stream(request(models["endless"], "dropped", secret, max_tokens=10**6))
    while not isinstance(await anext(dropped), Token):
        pass
    await dropped.aclose()  # type: ignore[attr-defined]
    await collect(client.stream(request(models["tiny"], "last", secret)))
    await client.close()

    log = paths.engine_log().read_text()
    assert "DEBUG" in log and secret not in log and secret.lower() not in log.lower()
    assert answers["answered"] == answers["raw"] == "B" * 8
    assert "BB" not in log
    lines = [text for text in log.splitlines() if "request ended" in text]
    assert len(lines) == len(requests) + 2
    by_id = {asked.id: told for asked, told in zip(requests, lines, strict=False)}
    for id, end in ends.items():
        assert f"id={json.dumps(id)} " in by_id[id]
        how = f'reason="{end.reason}"' if isinstance(end, Finished) else f'code="{end.code}"'  # type: ignore[union-attr]
        assert how in by_id[id]
    assert re.search(
        r'client="me" model="tiny" reason="length" prompt_tokens=37 cached_tokens=0 '
        r"generated_tokens=8 queue_s=\d+\.\d{4} prefill_s=\d+\.\d{4} decode_s=\d+\.\d{4}$",
        by_id["answered"],
    ), by_id["answered"]
    assert 'reason="cancelled"' in next(told for told in lines if 'id="dropped"' in told)
    for told in ("loaded model=", "unloaded model=", "load failed model="):
        assert f'{told}"' in log


async def test_by_default_the_log_holds_nothing_of_what_went_well(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    await collect(client.stream(request(models["tiny"], "a")))
    assert "request ended" not in paths.engine_log().read_text()


def test_a_line_is_one_line_whatever_it_tells() -> None:
    forged = 'a" b="c\n2026 INFO request ended'
    told = line("request ended", id=forged, seconds=1.5, count=3, code=None, other="é\x1b[2J")
    assert told.count("\n") == 0 and "\x1b" not in told
    assert told.endswith(r'seconds=1.5000 count=3 other="\u00e9\u001b[2J"')
    assert "code" not in told


def test_the_ledger_shows_names_of_any_length_in_little() -> None:
    ledger, long = Ledger(), "x" * 1_000_000
    ledger.began("connection 1", request(ModelRef(long, long), long, client=long))
    assert len(msgspec.msgpack.encode(ledger.statuses())) < 2000
    ledger.saw("connection 1", Failed(long, "queue_full", ""))
    assert ledger.statuses() == []


def test_events_after_the_end_or_of_others_count_nothing() -> None:
    ledger = Ledger()
    ledger.began("connection 1", request(ModelRef("m", "/m"), "a"))
    ledger.began("connection 2", LoadModel("a", ModelRef("m", "/m")))
    end = Finished("a", "stop", Usage(0, 0, 0), Timings(0.0, 0.0, 0.0))
    ledger.saw("connection 2", Progress("a", "load", 0, 1))
    assert [one.phase for one in ledger.statuses()] == ["preparing", "loading"]
    ledger.saw("connection 2", end)
    ledger.saw("connection 2", Token("a", "", 1))
    ledger.saw("connection 3", Accepted("a", 5, 0, None))
    counters = ledger.counters(0)
    assert (counters.finished, counters.prompt_tokens, counters.generated_tokens) == ({}, 0, 0)
    ledger.saw("connection 1", end)
    ledger.saw("connection 1", end)
    assert ledger.counters(0).finished == {"stop": 1}
