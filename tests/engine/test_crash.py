"""kill -9 of the real engine at every stage, under load: every request ends exactly once, nothing
stays behind, the next request works, and what crashes again and again is not tried without end."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from app.engine import client as client_module
from app.engine.client import Backoff, EngineClient
from app.engine.protocol import (
    Accepted,
    DraftModel,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Message,
    ModelRef,
    Progress,
    Sampling,
    Token,
)

from ..rounds import rounds
from ..tiny_models import LLAMA, OPEN_LLAMA, RECURRENT_GEMMA, write_model
from .asking import check_files

PHASES = ("load", "prefill", "decode", "idle")
# Some 160 chunks: longer than a test needs to find the engine reading it.
LONG_PROMPT = 20_000


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    """A Griffin, whose prompts may be long, and one that takes a second to load: the first of
    mlx-lm's families in a process imports transformers."""
    root = tmp_path_factory.mktemp("crash")
    configs = {"griffin": RECURRENT_GEMMA, "slow": LLAMA, "bomb": OPEN_LLAMA}
    return {
        name: ModelRef(name, str(write_model(root / name, config)))
        for name, config in configs.items()
    }


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient()
    yield client
    await client.close()


@pytest.fixture
async def other_client() -> AsyncIterator[EngineClient]:
    client = EngineClient()
    yield client
    await client.close()


def looping_model(directory: Path) -> ModelRef:
    """A model whose chat template does not end."""
    path = write_model(directory / "looping", OPEN_LLAMA)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": loop}))
    return ModelRef("looping", str(path))


def request(model: ModelRef, id: str = "r", **fields: object) -> GenerationRequest:
    values: dict[str, object] = {"sampling": Sampling(temperature=0), "max_tokens": 4}
    if not fields.keys() & {"messages", "prompt", "prompt_tokens"}:
        values["messages"] = [Message("user", "Hello")]
    return GenerationRequest(id=id, model=model, **(values | fields))  # type: ignore[arg-type]


def requests_under_load(
    draw: random.Random, model: ModelRef, name: str, max_tokens: int
) -> list[GenerationRequest]:
    """Several kinds at once: chats and plain text, which are prepared, and token ids."""
    return [
        request(model, f"{name} chat", max_tokens=max_tokens),
        request(model, f"{name} text", prompt="Once upon a time", max_tokens=max_tokens),
        *(
            request(
                model,
                f"{name} tokens {i}",
                prompt_tokens=draw.choices(range(256), k=draw.randint(1, 300)),
                sampling=Sampling(temperature=1, seed=i),
                max_tokens=max_tokens,
            )
            for i in range(3)
        ),
    ]


async def collect(stream: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in stream]


def only_end(events: list[Event]) -> Finished | Failed:
    """The one terminal event, which must be the last."""
    ends = [event for event in events if isinstance(event, (Finished, Failed))]
    assert len(ends) == 1 and ends[0] is events[-1], events
    return ends[0]


async def answer(client: EngineClient, model: ModelRef) -> None:
    """A request that works, after the wait that the client may ask for."""
    for _ in range(3):
        end = only_end(await collect(client.stream(request(model, "next"))))
        if isinstance(end, Finished):
            assert end.usage.completion_tokens == 4
            return
        assert end.code == "engine_restarting" and end.retry_after, end
        await asyncio.sleep(end.retry_after)
    pytest.fail(f"the engine does not come back: {end}")


def processes_of(home: Path) -> list[str]:
    """Engines and their children that belong to this test, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if "app.engine" in command and process.environ().get("GRYPHON_HOME") == str(home):
                found.append(f"{process.pid}: {command}")
        except psutil.Error:  # gone meanwhile, a zombie, or another user's
            continue
    return found


async def until_no_process(home: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := processes_of(home):
        if time.monotonic() > deadline:
            pytest.fail(f"after {seconds} s there are still {left}")
        await asyncio.sleep(0.02)


async def pid_of(client: EngineClient) -> int:
    await client.start()
    status = await client.status()
    assert status is not None
    return status.pid


async def kill(client: EngineClient) -> None:
    """kill -9, and wait until the client knows."""
    pid, listener = await pid_of(client), client._listener
    os.kill(pid, signal.SIGKILL)
    assert listener is not None
    await listener


async def test_kill_9_in_every_phase_under_load(
    client: EngineClient,
    other_client: EngineClient,
    models: dict[str, ModelRef],
    home: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Rounds with one pair of clients, so that what a crash leaves behind adds up.

    Either client may own the engine: a crash gives ownership to whoever asks next.
    """
    ended = kept = 0
    for number in rounds(8):
        draw = random.Random(number)
        phase = PHASES[number % len(PHASES)]
        model = models["slow" if phase == "load" else "griffin"]
        max_tokens = 3 if phase == "idle" else 5000
        if phase == "load":  # what is loaded already would hardly take time
            await answer(client, models["griffin"])
            await kill(client)
        pid = await pid_of(client)
        await other_client.start()
        moment, tokens, wanted = asyncio.Event(), 0, draw.randint(1, 60)

        async def watch(
            which: EngineClient,
            asked: GenerationRequest,
            phase: str = phase,
            moment: asyncio.Event = moment,
            wanted: int = wanted,
        ) -> list[Event]:
            nonlocal tokens
            events = []
            async for event in which.stream(asked):
                events.append(event)
                if isinstance(event, Token):
                    tokens += 1
                    if phase == "decode" and tokens == wanted:
                        moment.set()
                elif (
                    isinstance(event, Progress)
                    and event.phase == phase
                    and (phase == "load" or event.processed < event.total // 2)
                ):
                    moment.set()
            return events

        asked = [
            (which, each)
            for which, name in ((client, "first"), (other_client, "second"))
            for each in requests_under_load(draw, model, name, max_tokens)
        ]
        if phase == "prefill":
            prompt = draw.choices(range(256), k=LONG_PROMPT)
            asked.insert(3, (client, request(model, "long", prompt_tokens=prompt)))
        running = [asyncio.ensure_future(watch(which, each)) for which, each in asked]
        if phase == "idle":
            await asyncio.wait(running)
        else:
            await asyncio.wait_for(moment.wait(), timeout=60)
            await asyncio.sleep(draw.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        for events in await asyncio.wait_for(asyncio.gather(*running), timeout=10):
            end = only_end(events)
            ended += 1
            if phase == "idle":
                assert isinstance(end, Finished), (number, end)
            else:
                assert isinstance(end, Failed), (number, phase, end)
                assert end.code == "engine_crashed" and end.retry_after, (number, end)
            if phase == "load":
                assert not any(isinstance(event, Accepted) for event in events), "too late"
            if phase == "prefill" and end.id == "long":
                assert not any(isinstance(event, Token) for event in events), "too late"
        await until_no_process(home, seconds=1)
        kept += check_files(home / "cache" / "prefixes", killed=True)
        # Whoever asks first starts the next engine, though the other owned the one that died.
        for which in draw.sample([client, other_client], 2):
            await answer(which, model)
        assert await pid_of(client) == await pid_of(other_client) != pid
    record_property("kills", len(rounds(8)))
    record_property("requests_ended_once", ended)
    record_property("files_of_states_whole", kept)


async def test_a_prompt_in_preparation_ends_once_and_leaves_no_process(
    client: EngineClient, models: dict[str, ModelRef], home: Path, tmp_path: Path
) -> None:
    """The template loops until its time limit, and its process hears nothing until then."""
    looping = looping_model(tmp_path)
    engine = psutil.Process(await pid_of(client))
    running = asyncio.ensure_future(collect(client.stream(request(looping))))
    while not any(child.cpu_times().user > 0.3 for child in engine.children()):
        await asyncio.sleep(0.02)
    await kill(client)
    end = only_end(await running)
    assert isinstance(end, Failed) and end.code == "engine_crashed"
    await until_no_process(home, seconds=1)
    await answer(client, models["griffin"])


async def test_a_client_that_only_attached_has_its_next_request_answered(
    client: EngineClient, other_client: EngineClient, models: dict[str, ModelRef]
) -> None:
    """The owner of the engine that died may be a chat that nobody types in."""
    await client.start()
    await answer(other_client, models["griffin"])
    await kill(other_client)
    started = time.monotonic()
    await answer(other_client, models["griffin"])
    assert time.monotonic() - started < client_module._START_TIMEOUT_S / 2
    await answer(client, models["griffin"])
    assert await pid_of(client) == await pid_of(other_client)


async def test_an_engine_that_dies_before_a_request_reaches_it_is_started_again(
    client: EngineClient, models: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who noticed the death ended the streams there were; this one came a moment later."""
    genuine = client.start

    async def start_and_die() -> None:
        await genuine()
        monkeypatch.setattr(client, "start", genuine)
        await kill(client)

    monkeypatch.setattr(client, "start", start_and_die)
    await asyncio.wait_for(answer(client, models["griffin"]), timeout=60)


async def test_the_first_restart_is_not_delayed_later_ones_are_and_an_answer_ends_that(
    client: EngineClient, models: dict[str, ModelRef]
) -> None:
    await kill(client)
    await kill(client)  # started again at once
    refused = only_end(await collect(client.stream(request(models["griffin"]))))
    assert isinstance(refused, Failed) and refused.code == "engine_restarting"
    assert "2 times in a row" in refused.message and "engine.log" in refused.message
    assert refused.retry_after == 1
    assert await client.status() is None, "started all the same"
    await asyncio.sleep(refused.retry_after)
    await answer(client, models["griffin"])
    await kill(client)
    await client.start()


def test_a_backoff_doubles_up_to_its_cap_and_forgets_after_a_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(client_module.time, "monotonic", lambda: now)
    backoff = Backoff(first_s=1, cap_s=30)
    for wait in (0, 1, 2, 4, 8, 16, 30, 30):
        backoff.failed()
        assert backoff.remaining_s == wait
        now += wait
        assert backoff.remaining_s == 0
    for _ in range(5000):  # no overflow
        backoff.failed()
    assert backoff.remaining_s == 30
    backoff.succeeded()
    assert backoff.remaining_s == 0
    backoff.failed()
    assert backoff.remaining_s == 0


async def test_a_model_that_crashes_the_engine_when_it_loads_is_not_loaded_in_a_loop(
    client: EngineClient,
    models: dict[str, ModelRef],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads = tmp_path / "loads"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "if 'app.engine.worker' in ' '.join(sys.orig_argv):\n"
        "    import mlxmodels\n"
        "    genuine = mlxmodels.load\n"
        "    def load(path, *rest, **options):\n"
        "        if str(path).endswith('bomb'):\n"
        f"            open({str(loads)!r}, 'a').write('x')\n"
        "            time.sleep(0.2)  # the news that it loads goes out\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return genuine(path, *rest, **options)\n"
        "    mlxmodels.load = load\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    ends = []
    for i in range(20):
        end = only_end(await collect(client.stream(request(models["bomb"], f"r{i}"))))
        assert isinstance(end, Failed)
        ends.append(end.code)
    assert ends == ["engine_crashed"] * 2 + ["model_crashes_engine"] * 18
    assert loads.read_text() == "xx"
    assert "bomb" in end.message and end.retry_after and 20 < end.retry_after <= 30
    # Other models are served, and that does not make this one any better.
    await answer(client, models["griffin"])
    end = only_end(await collect(client.load(models["bomb"])))
    assert isinstance(end, Failed) and end.code == "model_crashes_engine"
    assert loads.read_text() == "xx"
    # One that would only have drafted for another does not keep that from answering.
    drafted = DraftModel(models["bomb"])
    for code in ("engine_crashed", "engine_crashed", "model_crashes_engine"):
        guessing = request(models["griffin"], speculation=drafted)
        end = only_end(await collect(client.stream(guessing)))
        assert isinstance(end, Failed) and end.code == code
    assert "griffin with bomb" in end.message
    await answer(client, models["griffin"])


PARENT = """
import asyncio, sys
from app.engine.client import EngineClient
from app.engine.protocol import *
phase, path = sys.argv[1:]
async def main():
    client = EngineClient()
    await client.start()
    if phase in ("idle", "prepare"):
        print("now", flush=True)
    if phase == "idle":
        await asyncio.sleep(600)
    prompt = [1] * (20_000 if phase == "prefill" else 5)
    request = GenerationRequest(id="r", model=ModelRef("m", path), prompt_tokens=prompt,
                                max_tokens=100_000)
    if phase == "prepare":
        messages = [Message("user", "")]
        request = GenerationRequest(id="r", model=ModelRef("m", path), messages=messages)
    async for event in client.stream(request):
        kind = "decode" if isinstance(event, Token) else getattr(event, "phase", "")
        if kind == phase:
            print("now", flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("phase", ["prepare", *PHASES])
async def test_the_engine_ends_within_a_second_of_its_killed_parent(
    phase: str, models: dict[str, ModelRef], home: Path, tmp_path: Path
) -> None:
    path = models["slow" if phase == "load" else "griffin"].path
    if phase == "prepare":
        path = looping_model(tmp_path).path
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, phase, path], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert await asyncio.to_thread(parent.stdout.readline) == "now\n"
    assert any("app.engine.worker" in process for process in processes_of(home))
    while phase == "prepare" and not any("preparation" in each for each in processes_of(home)):
        await asyncio.sleep(0.02)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    await until_no_process(home, seconds=1)
    check_files(home / "cache" / "prefixes", killed=True)
