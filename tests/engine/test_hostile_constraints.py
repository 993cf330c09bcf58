"""Constraints made to break the engine end their own request; whatever runs beside them goes on,
and no process is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import socket
from collections.abc import Iterator

import psutil
import pytest

from app.engine.client import EngineClient
from app.engine.constraint import Constraint
from app.engine.protocol import Event, Failed, Finished, GenerationRequest, ModelRef, Token
from app.errors import GryphonError

from ..scheduler_rig import Rig, until_end
from ..tiny_models import RECURRENT_GEMMA, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    path = tmp_path_factory.mktemp("hostile") / "tiny"
    return ModelRef("tiny", str(write_model(path, RECURRENT_GEMMA)))


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def request(model: ModelRef, constraint: Constraint | None, **fields: int) -> GenerationRequest:
    return GenerationRequest(
        id="r",
        model=model,
        prompt_tokens=[1, 2, 3],
        constraint=constraint,
        **({"max_tokens": 40} | fields),  # type: ignore[arg-type]
    )


def followers(root: int) -> list[psutil.Process]:
    """The matchers' processes under a process that still run: vocabularies, then rows."""
    found = psutil.Process(root).children(recursive=True)
    return [
        process
        for process in found
        if process.status() != psutil.STATUS_ZOMBIE
        and "app.engine.matcher_process" in process.cmdline()
    ]


_OBJECTS = [
    [{"type": "object", "properties": {f"{k}.{i}": {}}, "required": [f"{k}.{i}"]} for i in range(9)]
    for k in range(9)
]
_REFUSED = {
    "a schema nested deeply": Constraint("json_schema", '{"items":' * 10_000 + "{}" + "}" * 10_000),
    "references in a circle": Constraint(
        "json_schema",
        '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}',
    ),
    "a schema of products": Constraint(
        "json_schema", json.dumps({"allOf": [{"anyOf": part} for part in _OBJECTS]})
    ),
    "a regex nested deeply": Constraint("regex", "(" * 50_000 + "a" + ")*" * 50_000),
    "rules nested deeply": Constraint(
        "lark", "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(9000)) + '\na9000: "x"'
    ),
    "an empty language": Constraint("lark", 'start: start "a"'),
    "a grammar without end": Constraint("lark", 'start: "a" more\nmore: "b" more'),
    "a megabyte": Constraint("lark", "start: " + '"abcdefgh" ' * 95_000),
    "a schema from elsewhere": Constraint("json_schema", '{"$ref": "http://127.0.0.1:9/s.json"}'),
}
_FOLLOWED = {
    "repetitions of repetitions": Constraint("regex", "(((a{1,1000}b){1,1000}c){1,1000}d){1,1000}"),
    "a long tail": Constraint("regex", "(a|b|ab|ba){1,500}(.*x.{40}){5}"),
    "endless arrays": Constraint(
        "json_schema", '{"minItems": 1000000000, "items": {"type": "array", "minItems": 1000000}}'
    ),
    "ten thousand choices": Constraint(
        "json_schema", json.dumps({"enum": [f"choice {i}" for i in range(10_000)]})
    ),
    "left recursion": Constraint("lark", 'start: s\ns: s s | "a" | ""'),
    "a schema in itself": Constraint(
        "json_schema", '{"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}'
    ),
}


def test_each_ends_by_itself_and_the_others_go_on(
    rig: Rig, model: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)  # nobody looks for the schema from elsewhere
    stream, events = rig.submit(request(model, None, max_tokens=10**6))
    for name, constraint in (_REFUSED | _FOLLOWED).items():
        before = _tokens(events)
        try:
            end = rig.events(request(model, constraint))[-1]
        except GryphonError as error:  # check_request, before anything else
            end = Failed("r", error.code, error.message)
        if name in _REFUSED:
            assert isinstance(end, Failed), name
            assert end.code in ("invalid_constraint", "constraint_failed"), (name, end)
            assert len(end.message) < 400, name
        else:
            assert isinstance(end, Finished), (name, end)
        assert not stream.done and before >= 0
        while not _tokens(events):  # goes on
            pass
    rig.scheduler.cancel(stream)
    until_end(events)


def _tokens(events: queue.SimpleQueue[Event]) -> int:
    """How many tokens have come since one asked last."""
    count = 0
    while not events.empty():
        event = events.get()
        assert not isinstance(event, (Finished, Failed)), event
        count += isinstance(event, Token)
    return count


def test_what_takes_too_long_is_ended_while_others_stream(rig: Rig, model: ModelRef) -> None:
    stream, events = rig.submit(request(model, None, max_tokens=10**6))
    while not _tokens(events):
        pass
    slow = Constraint("json_schema", '{"type": "integer", "multipleOf": 99999989}')
    assert "too much time" in rig.failure(request(model, slow)).message
    assert _tokens(events) > 20  # it takes a second at least
    rig.scheduler.cancel(stream)
    until_end(events)


def test_a_process_that_dies_ends_its_row_alone(rig: Rig, model: ModelRef) -> None:
    endless = Constraint("regex", "[ab]*")
    streams = [rig.submit(request(model, endless, max_tokens=10**6)) for _ in range(2)]
    free, events = rig.submit(request(model, None, max_tokens=10**6))
    vocabulary, *rows = sorted(followers(os.getpid()), key=lambda process: process.pid)
    assert len(rows) == 2
    rows[0].kill()
    ended = until_end(streams[0][1])[-1]
    assert isinstance(ended, Failed) and ended.code == "constraint_failed"
    vocabulary.kill()  # the row that is left has all it needs; the next starts another
    vocabulary.wait()
    assert rig.answer(request(model, Constraint("regex", "abc"))) == ("abc", "stop")
    for row, coming in [streams[1], (free, events)]:
        assert not row.done
        rig.scheduler.cancel(row)
        end = until_end(coming)[-1]
        assert isinstance(end, Finished) and end.reason == "cancelled"
    # However they ended, no row has left a process; one reads vocabularies.
    while len(followers(os.getpid())) > 1:
        pass


async def test_nothing_outlives_the_engine(model: ModelRef) -> None:
    client = EngineClient()
    endless = Constraint("regex", "[ab]*")
    events = client.stream(request(model, endless, max_tokens=10**6))
    while not isinstance(await anext(events), Token):
        pass
    status = await client.status()
    assert status is not None
    running = followers(status.pid)
    assert len(running) == 2
    psutil.Process(status.pid).kill()
    assert isinstance([event async for event in events][-1], Failed)
    gone, alive = await asyncio.to_thread(psutil.wait_procs, running, timeout=10)
    assert not alive
    # And cancelling while a constraint is compiled leaves nothing either.
    slow = Constraint("json_schema", '{"type": "integer", "multipleOf": 999983}')
    compiling = client.stream(request(model, slow))
    first = asyncio.ensure_future(anext(compiling))
    status = None
    while status is None or len(followers(status.pid)) < 2:
        await asyncio.sleep(0.01)
        status = await client.status()
    await client.cancel("r")
    end = await first
    assert isinstance(end, Finished) and end.reason == "cancelled"
    while len(followers(status.pid)) > 1:
        await asyncio.sleep(0.01)
    await client.close()
