"""The real engine process behind the real client: started, shared, killed, orphaned, refused."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app import paths
from app.engine import client as client_module
from app.engine import engine_process
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
)

from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    path = tmp_path_factory.mktemp("process") / "tiny"
    return ModelRef("tiny", str(write_model(path, OPEN_LLAMA)))


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient()
    yield client
    await client.close()


def request(model: ModelRef, id: str = "r", **fields: object) -> GenerationRequest:
    values: dict[str, object] = {
        "messages": [Message("user", "Hello")],
        "sampling": Sampling(temperature=0),
        "max_tokens": 8,
    }
    return GenerationRequest(id=id, model=model, **(values | fields))  # type: ignore[arg-type]


async def collect(stream: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in stream]


def tokens(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


async def until_gone(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"process {pid} is still there after {seconds} s")


async def test_a_request_is_answered_in_order_with_one_end(
    client: EngineClient, model: ModelRef
) -> None:
    events = await collect(client.stream(request(model)))
    kinds = [type(event) for event in events]
    assert kinds.index(Accepted) < kinds.index(Token)
    assert kinds[-1] is Finished and kinds.count(Finished) == 1 and Failed not in kinds
    accepted = next(event for event in events if isinstance(event, Accepted))
    # One token a byte and one for each special: <start>user\nHello<end>\n<start>assistant\n
    assert accepted.prompt_tokens == 1 + 5 + 5 + 1 + 1 + 1 + 10
    assert accepted.context_length == 512


async def test_many_requests_at_once_each_get_their_own_answer(
    client: EngineClient, model: ModelRef
) -> None:
    prompts = [f"number {i} " * (i + 1) for i in range(6)]
    alone = [
        tokens(await collect(client.stream(request(model, f"a{i}", messages=None, prompt=text))))
        for i, text in enumerate(prompts)
    ]
    together = await asyncio.gather(
        *(
            collect(client.stream(request(model, f"b{i}", messages=None, prompt=text)))
            for i, text in enumerate(prompts)
        )
    )
    assert [tokens(events) for events in together] == alone


async def test_two_clients_share_one_engine(client: EngineClient, model: ModelRef) -> None:
    await collect(client.stream(request(model)))
    second = EngineClient()
    try:
        # The same id from another client is another request.
        assert tokens(await collect(second.stream(request(model)))) == tokens(
            await collect(client.stream(request(model)))
        )
        first_status, second_status = await client.status(), await second.status()
        assert first_status and second_status and first_status.pid == second_status.pid
    finally:
        await second.close()
    assert isinstance((await collect(client.stream(request(model))))[-1], Finished)


async def test_an_answer_goes_on_when_the_owner_of_the_engine_closes(model: ModelRef) -> None:
    owner, second = EngineClient(), EngineClient()
    await owner.start()
    streaming = second.stream(request(model, max_tokens=300))
    first = await anext(streaming)
    await owner.close()
    newcomer = EngineClient()  # attaches to the engine that is still there
    assert isinstance((await collect(newcomer.stream(request(model))))[-1], Finished)
    before, now = await second.status(), await newcomer.status()
    assert before and now and before.pid == now.pid
    await newcomer.close()
    rest = await collect(streaming)
    assert isinstance(rest[-1], Finished) and len(tokens([first, *rest])) == 300
    # With the last client gone the engine goes, and the next one starts its own.
    await second.close()
    await until_gone(now.pid, seconds=1)
    third = EngineClient()
    assert isinstance((await collect(third.stream(request(model))))[-1], Finished)
    await third.close()


async def test_kill_9_fails_what_runs_once_and_the_next_request_works(
    client: EngineClient, model: ModelRef
) -> None:
    await client.start()
    status = await client.status()
    assert status is not None

    async def watch(request_id: str) -> list[Event]:
        events: list[Event] = []
        async for event in client.stream(request(model, request_id, max_tokens=400)):
            events.append(event)
            if isinstance(event, Token) and len(tokens(events)) == 2:
                os.kill(status.pid, signal.SIGKILL)
        return events

    for events in await asyncio.gather(watch("a"), watch("b")):
        ends = [event for event in events if isinstance(event, (Finished, Failed))]
        assert ends == events[-1:]
        assert isinstance(ends[0], Failed) and ends[0].code == "engine_crashed"
        assert "signal 9" in ends[0].message
    assert isinstance((await collect(client.stream(request(model))))[-1], Finished)
    again = await client.status()
    assert again is not None and again.pid != status.pid


async def test_cancel_frees_the_row_and_says_so(client: EngineClient, model: ModelRef) -> None:
    events: list[Event] = []
    async for event in client.stream(request(model, "c", max_tokens=400)):
        events.append(event)
        if isinstance(event, Token) and len(tokens(events)) == 3:
            await client.cancel("c")
    end = events[-1]
    assert isinstance(end, Finished) and end.reason == "cancelled"
    assert len(tokens(events)) < 400


async def test_cancelling_at_once_is_one_end_whatever_the_request_was_doing(
    client: EngineClient, model: ModelRef
) -> None:
    """While the engine starts, before the request's first step, while it is prepared, and later."""

    async def cancelled_after(turns: int, request_id: str) -> Event:
        stream = client.stream(request(model, request_id, max_tokens=400))
        first = asyncio.ensure_future(anext(stream))
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.cancel(request_id)
        events = [await first, *(await collect(stream))]
        ends = [event for event in events if isinstance(event, (Finished, Failed))]
        assert ends == events[-1:]
        return ends[0]

    for turns in (1, 2, 3, 5, 10, 100, 1000):
        end = await cancelled_after(turns, f"c{turns}")
        assert isinstance(end, Finished) and end.reason == "cancelled", turns
    assert isinstance((await collect(client.stream(request(model))))[-1], Finished)


async def test_an_id_in_use_is_refused_and_the_first_request_is_not_disturbed(
    client: EngineClient, model: ModelRef
) -> None:
    first = client.stream(request(model, "same", max_tokens=40))
    opening = await anext(first)
    (second,) = await collect(client.stream(request(model, "same")))
    assert isinstance(second, Failed) and "same" in second.message
    rest = await collect(first)
    assert isinstance(rest[-1], Finished) and len(tokens([opening, *rest])) == 40


async def test_an_engine_that_cannot_start_is_tried_once_a_request(
    client: EngineClient, model: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned = []
    genuine = subprocess.Popen

    def counting(*arguments: Any, **options: Any) -> Any:
        spawned.append(arguments)
        return genuine([sys.executable, "-c", "raise SystemExit(3)"], stderr=subprocess.DEVNULL)

    monkeypatch.setattr(engine_process.subprocess, "Popen", counting)
    failed = (await collect(client.stream(request(model))))[-1]
    assert isinstance(failed, Failed) and failed.code == "engine_not_started"
    assert "exit status 3" in failed.message and "engine.log" in failed.message
    assert len(spawned) == 1


async def test_closing_while_the_engine_starts_ends_what_waits(model: ModelRef) -> None:
    client = EngineClient()
    stream = client.stream(request(model))
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await client.close()
    assert isinstance(await first, (Failed, Finished))
    await stream.aclose()  # type: ignore[attr-defined]


async def test_an_engine_whose_mlx_thread_fails_ends_instead_of_hanging(
    client: EngineClient, model: ModelRef, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib, sys\n"
        "if 'app.engine.worker' in ' '.join(sys.orig_argv):\n"
        "    from app.engine.scheduler import Scheduler\n"
        "    Scheduler._admit = lambda self: 1 / 0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failed = (await collect(client.stream(request(model))))[-1]
    assert isinstance(failed, Failed) and failed.code == "engine_crashed"
    assert "ZeroDivisionError" in paths.engine_log().read_text()


async def test_leaving_a_stream_early_cancels_it(client: EngineClient, model: ModelRef) -> None:
    stream = client.stream(request(model, max_tokens=400))
    async for event in stream:
        if isinstance(event, Token):
            break
    await stream.aclose()  # type: ignore[attr-defined]
    await collect(client.stream(request(model, "next", max_tokens=1)))
    status = await client.status()
    assert status is not None and status.running == 0


async def test_a_client_that_disappears_takes_its_rows_with_it(
    client: EngineClient, model: ModelRef
) -> None:
    await client.start()
    other = EngineClient()
    stream = other.stream(request(model, max_tokens=400))
    async for event in stream:
        if isinstance(event, Token):
            break
    assert other._writer is not None
    other._writer.transport.abort()
    await collect(client.stream(request(model, max_tokens=1)))
    status = await client.status()
    assert status is not None and status.running == 0
    await other.close()


PARENT = """
import asyncio, sys
from app.engine.client import EngineClient
async def main():
    client = EngineClient()
    await client.start()
    print((await client.status()).pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_the_engine_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    engine_pid = int(await asyncio.to_thread(parent.stdout.readline))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    await until_gone(engine_pid, seconds=1)


async def test_close_ends_the_engine_and_frees_the_lock() -> None:
    client = EngineClient()
    await client.start()
    status = await client.status()
    assert status is not None
    await client.close()
    await until_gone(status.pid, seconds=1)
    following = EngineClient()
    await following.start()
    await following.close()


async def test_socket_lock_and_log_are_private(client: EngineClient) -> None:
    await client.start()
    for path in (paths.engine_socket(), paths.engine_lock(), paths.engine_log()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(paths.state_dir().stat().st_mode) == 0o700


async def test_status_without_an_engine_starts_none(client: EngineClient) -> None:
    assert await client.status() is None
    assert not paths.engine_socket().exists()


async def test_an_engine_of_another_version_is_refused_by_name(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch, model: ModelRef
) -> None:
    await client.start()
    monkeypatch.setattr(client_module, "PROTOCOL_VERSION", 999)
    other = EngineClient()
    events = await collect(other.stream(request(model)))
    assert isinstance(events[-1], Failed) and events[-1].code == "engine_version"
    await other.close()


async def test_load_reports_progress_and_status_names_the_model(
    client: EngineClient, model: ModelRef
) -> None:
    events = await collect(client.load(model))
    assert isinstance(events[-1], Finished)
    status = await client.status()
    assert status is not None and status.model == model and status.state == "ready"
    assert status.weight_bytes > 0 and "float32" in status.backend_note


async def test_bad_requests_fail_alone_and_clearly(client: EngineClient, model: ModelRef) -> None:
    cases: list[tuple[GenerationRequest, str, str]] = [
        (request(model, prompt="both"), "invalid_request", "exactly one"),
        (request(model, sampling=Sampling(temperature=9)), "invalid_sampling", "0 to 2"),
        (request(ModelRef("gone", "/nowhere")), "invalid_model", "/nowhere"),
        (request(model, messages=[Message("user", "x" * 600)]), "context_length_exceeded", "512"),
        (request(model, messages=None, prompt=""), "invalid_request", "no token"),
    ]
    for bad, code, said in cases:
        failed = (await collect(client.stream(bad)))[-1]
        assert isinstance(failed, Failed), bad
        assert failed.code == code and said in failed.message, failed
    assert isinstance((await collect(client.stream(request(model))))[-1], Finished)


async def test_a_template_that_never_ends_does_not_stall_a_running_stream(
    client: EngineClient, model: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.setenv("GRYPHON_PROMPT_TIME_LIMIT", "1")
    path = write_model(tmp_path / "looping", RECURRENT_GEMMA)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": loop}))

    finished_first: list[str] = []

    async def run(which: GenerationRequest) -> list[Event]:
        events = await collect(client.stream(which))
        finished_first.append(which.id)
        return events

    bad, good = await asyncio.gather(
        run(request(ModelRef("looping", str(path)), "bad")),
        run(request(model, "good", messages=None, prompt_tokens=[1, 2, 3], max_tokens=100)),
    )
    assert isinstance(good[-1], Finished) and len(tokens(good)) == 100
    assert isinstance(bad[-1], Failed) and bad[-1].code == "prompt_too_slow"
    assert finished_first == ["good", "bad"]
    assert isinstance((await collect(client.stream(request(model))))[-1], Finished)
