"""When things go wrong or slowly: failures, disconnects, silence, slow readers, health."""

from __future__ import annotations

import asyncio
import http.client
import json
from pathlib import Path

import pytest

from app.engine.protocol import Failed, Finished, Progress, Timings, Usage
from app.errors import GryphonError
from app.server import log_file

from .conftest import SMOL, ScriptedEngine, Server, chat, completion

WAIT_S = 30
WORDS = "secret words of a prompt"

STATUS = {
    "context_length_exceeded": 400,
    "invalid_request": 400,
    "invalid_sampling": 400,
    "template_error": 400,
    "invalid_model": 400,
    "does_not_fit": 400,
    "model_not_found": 404,
    "model_busy": 503,
    "queue_full": 503,
    "out_of_memory": 503,
    "engine_restarting": 503,
    "engine_stopped": 503,
    "model_crashes_engine": 503,
    "engine_crashed": 500,
    "something_new": 500,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("code", "status"), STATUS.items())
def test_failure_before_the_first_token_has_its_status(
    server: Server, engine: ScriptedEngine, code: str, status: int, stream: bool
) -> None:
    progress = Progress("", "prefill", 0, 10)
    engine.answers = [[progress, Failed("", code, "It failed. Try again.", 2.5)]]
    reply = server.post("/v1/chat/completions", chat(stream=stream))
    assert reply.status == status
    assert reply.error == {
        "message": "It failed. Try again.",
        "type": "server_error" if status >= 500 else "invalid_request_error",
        "param": None,
        "code": code,
    }
    assert reply.headers.get("retry-after") == ("3" if status == 503 else None)


def test_retry_after_is_one_second_unless_the_engine_knows_better(
    server: Server, engine: ScriptedEngine
) -> None:
    engine.answers = [[Failed("", "queue_full", "Busy.")]]
    assert server.post("/v1/completions", completion()).headers["retry-after"] == "1"


def test_failure_midway_is_a_frame_without_done(server: Server, engine: ScriptedEngine) -> None:
    engine.answers = [["a", Failed("", "engine_crashed", "It died.")]]
    body = server.post("/v1/completions", completion(stream=True)).body
    assert body.endswith(
        b'\n\ndata: {"error":{"message":"It died.","type":"server_error","param":null,'
        b'"code":"engine_crashed"}}\n\n'
    )
    assert b"[DONE]" not in body


@pytest.mark.parametrize("stream", [False, True])
def test_answer_cancelled_by_somebody_else_is_not_taken_for_whole(
    server: Server, engine: ScriptedEngine, stream: bool
) -> None:
    cancelled = Finished("", "cancelled", Usage(7, 1, 0), Timings(0, 0, 0))
    engine.answers = [["a", cancelled]]
    reply = server.post("/v1/completions", completion(stream=stream))
    assert b'"code":"cancelled"' in reply.body
    assert b'"finish_reason":"' not in reply.body
    assert reply.status == (200 if stream else 503)


class Broken(ScriptedEngine):
    """Breaks its contract: `kind` says how."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    async def start(self) -> None:
        if self.kind == "refuses":
            raise GryphonError("out_of_memory", "No room for the engine.", retry_after=4)

    async def stream(self, request):  # type: ignore[no-untyped-def, override]
        if self.kind == "raises":
            raise RuntimeError(WORDS)
        return
        yield


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("refuses", 503, "out_of_memory"),
        ("raises", 500, "internal_error"),
        ("ends early", 500, "engine_crashed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_engine_that_breaks_its_contract(
    server: Server, kind: str, status: int, code: str, stream: bool
) -> None:
    server.board.current = Broken(kind)
    reply = server.post("/v1/chat/completions", chat(stream=stream))
    assert (reply.status, reply.error["code"]) == (status, code)
    assert WORDS.encode() not in reply.body and b"Traceback" not in reply.body


def test_log_has_the_stack_but_not_the_words(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRYPHON_HOME", str(home))
    log_file.configure(access_log=False)  # another server of this process may have its own since
    server.board.current = Broken("raises")
    server.post("/v1/chat/completions", chat("my secret"))
    log = home / "state" / "server.log"
    text = log.read_text()
    assert "RuntimeError" in text and "test_streaming.py" in text
    assert WORDS not in text and "my secret" not in text
    assert log.stat().st_mode & 0o777 == 0o600


def test_fault_in_a_handler_is_a_plain_500(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(server.thread.models, "installed_models", fail)
    reply = server.call("GET", "/v1/models")
    assert reply.status == 500
    assert reply.error["code"] == "internal_error"
    assert b"secret" not in reply.body
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("pieces", [[], ["a"]])
def test_client_that_leaves_a_stream_cancels(impatient_server: Server, pieces: list[str]) -> None:
    engine = impatient_server.board.current
    engine.answers = [[*pieces, asyncio.Event()]]
    with impatient_server.streaming("/v1/chat/completions", chat(stream=True)) as response:
        response.readline()
        assert engine.cancelled == []
    assert engine.ended.wait(WAIT_S)
    assert engine.cancelled == [engine.requests[0].id]


def test_client_that_does_not_wait_for_a_whole_answer_cancels(
    server: Server, engine: ScriptedEngine
) -> None:
    engine.answers = [["a", asyncio.Event()]]
    connection = server.connect()
    connection.request(
        "POST", "/v1/completions", json.dumps(completion()), {"Content-Type": "application/json"}
    )
    assert engine.begun.wait(WAIT_S)
    connection.close()
    assert engine.ended.wait(WAIT_S)
    assert engine.cancelled == [engine.requests[0].id]


def test_client_that_stops_reading_stops_the_engine_too(
    server: Server, engine: ScriptedEngine
) -> None:
    """Nothing of ours grows while a client does not read: tokens wait in the engine."""
    text = "x" * 65536
    total = 2000
    taken = 0

    class Counting(ScriptedEngine):
        async def stream(self, request):  # type: ignore[no-untyped-def, override]
            nonlocal taken
            self.answers = [[text] * total]
            try:
                async for event in super().stream(request):
                    taken += 1
                    yield event
            finally:
                self.ended.set()

    server.board.current = Counting()
    with server.streaming("/v1/completions", completion(stream=True)) as response:
        response.readline()
        # Answers to others show that the loop has had its chance to run ahead.
        for _ in range(50):
            assert server.call("GET", "/health").status == 200
        assert taken < total / 2
    assert server.board.current.ended.wait(WAIT_S)


def test_silence_is_filled_with_comments(impatient_server: Server) -> None:
    engine = impatient_server.board.current
    gate = asyncio.Event()
    engine.answers = [[gate, "late"]]
    with impatient_server.streaming("/v1/chat/completions", chat(stream=True)) as response:
        lines = [response.readline() for _ in range(6)]
        assert b'"role":"assistant"' in lines[0]
        assert lines[1:] == [b"\n", b": keep-alive\n", b"\n", b": keep-alive\n", b"\n"]
        engine.release(gate)
        rest = response.read()
    assert b'"content":"late"' in rest
    assert rest.endswith(b"data: [DONE]\n\n")
    assert engine.cancelled == []


def test_failure_after_the_first_comment_is_a_frame(impatient_server: Server) -> None:
    engine = impatient_server.board.current
    gate = asyncio.Event()
    engine.answers = [[gate, Failed("", "out_of_memory", "No room.")]]
    with impatient_server.streaming("/v1/completions", completion(stream=True)) as response:
        assert response.status == 200
        assert response.readline() == b": keep-alive\n"
        engine.release(gate)
        assert b'"code":"out_of_memory"' in response.read()


def test_silence_does_not_touch_a_whole_answer(impatient_server: Server) -> None:
    engine = impatient_server.board.current
    gate = asyncio.Event()
    engine.answers = [[gate, "late"]]
    connection = impatient_server.connect()
    connection.request(
        "POST", "/v1/completions", json.dumps(completion()), {"Content-Type": "application/json"}
    )
    assert engine.begun.wait(WAIT_S)
    engine.release(gate)
    answer = json.loads(connection.getresponse().read())
    connection.close()
    assert answer["choices"][0]["text"] == "late"


def test_health_and_models_answer_while_a_stream_runs(
    server: Server, engine: ScriptedEngine
) -> None:
    gate = asyncio.Event()
    engine.answers = [["a", gate, "b"]]
    with server.streaming("/v1/completions", completion(stream=True)) as response:
        first = response.readline()
        assert b'"text":"a"' in first
        health = server.call("GET", "/health").json
        assert health == {"status": "ok", "engine": "ready", "model": SMOL.name}
        assert server.call("GET", "/v1/models").status == 200
        engine.release(gate)
        assert response.read().endswith(b"[DONE]\n\n")


def test_requests_run_at_the_same_time(server: Server, engine: ScriptedEngine) -> None:
    gate = asyncio.Event()
    engine.answers = [["a", gate], ["b"]]
    with server.streaming("/v1/completions", completion(stream=True)) as slow:
        slow.readline()
        assert server.post("/v1/completions", completion()).json["choices"][0]["text"] == "b"
        engine.release(gate)
        slow.read()


def test_health_does_not_start_the_engine(server: Server, engine: ScriptedEngine) -> None:
    assert server.call("GET", "/health").json["engine"] == "unloaded"
    assert server.call("GET", "/v1/models").status == 200
    assert server.call("GET", "/").status == 200
    assert not engine.started


def test_health_of_a_stuck_engine(server: Server, engine: ScriptedEngine) -> None:
    engine.stuck = True
    reply = server.call("GET", "/health")
    assert reply.status == 200
    assert reply.json == {"status": "ok", "engine": "unresponsive", "model": None}


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (GryphonError("engine_crashed", "It died."), "stopped"),
        (ConnectionResetError(), "unresponsive"),
    ],
)
def test_health_of_a_dead_engine(
    server: Server, engine: ScriptedEngine, error: Exception, state: str
) -> None:
    engine.status_error = error
    assert server.call("GET", "/health").json["engine"] == state


def test_pipelined_and_kept_alive_connections(server: Server) -> None:
    connection = server.connect()
    for path in ("/health", "/v1/models", "/nowhere", "/health"):
        connection.request("GET", path)
        response: http.client.HTTPResponse = connection.getresponse()
        response.read()
        assert response.status == (404 if path == "/nowhere" else 200)
    connection.close()
