"""A model that nobody asks for gives its memory back, never while somebody does, and comes back."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from app.engine.batch import Row
from app.engine.client import EngineClient
from app.engine.keep_alive import KeepAlive
from app.engine.protocol import (
    EngineStatus,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    LoadModel,
    ModelRef,
    Progress,
    Sampling,
    Token,
    check_request,
)
from app.engine.scheduler import Scheduler
from app.errors import GryphonError

from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model

MIB = 1024**2


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    root = tmp_path_factory.mktemp("unload")
    # 64 MiB in tensors of several sizes: what the allocator keeps of them would be seen.
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    configs = {"tiny": OPEN_LLAMA, "griffin": RECURRENT_GEMMA, "wide": OPEN_LLAMA | wide}
    return {
        name: ModelRef(name, str(write_model(root / name, config)))
        for name, config in configs.items()
    }


def request(model: ModelRef, id: str = "r", **fields: object) -> GenerationRequest:
    values = {"sampling": Sampling(temperature=0), "max_tokens": 4, "prompt_tokens": [1, 2, 3]}
    return GenerationRequest(id=id, model=model, **(values | fields))  # type: ignore[arg-type]


class Engine:
    """A scheduler on its own thread that tells when it unloads."""

    def __init__(self, keep_alive_s: float) -> None:
        self.scheduler = Scheduler(2**24, keep_alive_s=keep_alive_s)
        self.unloaded = threading.Event()
        genuine = self.scheduler._unload

        def unload() -> None:
            had = self.scheduler._resident is not None
            genuine()
            if had:
                self.unloaded.set()

        self.scheduler._unload = unload  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self.scheduler.run, daemon=True)
        self._thread.start()

    def submit(self, asked: GenerationRequest | LoadModel) -> tuple[list[Event], threading.Event]:
        events: list[Event] = []
        ended = threading.Event()

        def emit(event: Event) -> None:
            events.append(event)
            if isinstance(event, (Finished, Failed)):
                ended.set()

        prompt = asked.prompt_tokens if isinstance(asked, GenerationRequest) else None
        self.scheduler.submit(Row(asked, emit, prompt or []))
        return events, ended

    def ask(self, asked: GenerationRequest | LoadModel) -> list[Event]:
        events, ended = self.submit(asked)
        assert ended.wait(60)
        return events

    def close(self) -> None:
        self.scheduler.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def start() -> Iterator[Callable[[float], Engine]]:
    engines = []

    def started(keep_alive_s: float) -> Engine:
        engines.append(Engine(keep_alive_s))
        return engines[-1]

    yield started
    for engine in engines:
        engine.close()


def loads(events: list[Event]) -> bool:
    return any(isinstance(event, Progress) and event.phase == "load" for event in events)


def test_a_model_goes_when_its_time_is_over_and_the_next_request_loads_it_again(
    start: Callable[[float], Engine], models: dict[str, ModelRef]
) -> None:
    engine = start(0.2)
    first = engine.ask(request(models["tiny"]))
    assert loads(first) and not engine.unloaded.is_set()
    ended = time.monotonic()
    assert engine.unloaded.wait(60)
    assert time.monotonic() - ended > 0.1
    second = engine.ask(request(models["tiny"]))
    assert loads(second)
    assert [e for e in first if isinstance(e, Token)] == [e for e in second if isinstance(e, Token)]


def test_a_request_in_time_finds_it_loaded_and_begins_the_time_anew(
    start: Callable[[float], Engine], models: dict[str, ModelRef]
) -> None:
    engine = start(60)
    engine.ask(request(models["tiny"]))
    assert not loads(engine.ask(request(models["tiny"])))
    assert not engine.unloaded.is_set()


def test_the_latest_request_decides(
    start: Callable[[float], Engine], models: dict[str, ModelRef]
) -> None:
    engine = start(0.05)
    for forever in (-1, math.inf, 1e300):
        engine.ask(request(models["tiny"], keep_alive_s=forever))
        assert not engine.unloaded.wait(0.2)
    engine.ask(request(models["tiny"], keep_alive_s=0))
    assert engine.unloaded.wait(60)
    engine.unloaded.clear()
    engine.ask(LoadModel("load", models["tiny"], keep_alive_s=-1))
    assert not engine.unloaded.wait(0.2)
    engine.ask(LoadModel("load", models["tiny"]))
    assert engine.unloaded.wait(60)


def test_never_during_an_answer_nor_while_others_wait(
    start: Callable[[float], Engine], models: dict[str, ModelRef]
) -> None:
    """The shortest time there is, a long answer, and requests that have to queue for the batch."""
    engine = start(0)
    many = [
        engine.submit(
            request(
                models["griffin"],
                f"{i}",
                prompt_tokens=[1] * (500 if i == 0 else 3),
                max_tokens=20,
                keep_alive_s=0,
            )
        )
        for i in range(24)
    ]
    for events, ended in many:
        assert ended.wait(60) and isinstance(events[-1], Finished), events
    assert sum(loads(events) for events, _ in many) == 1
    assert engine.unloaded.wait(60)
    lone = request(models["griffin"], "lone", prompt_tokens=[1] * 500, keep_alive_s=0)
    assert isinstance(engine.ask(lone)[-1], Finished), "unloaded between two chunks"


def test_nothing_is_left_of_an_unloaded_model(
    start: Callable[[float], Engine], models: dict[str, ModelRef]
) -> None:
    import mlx.core as mx

    engine = start(-1)
    engine.ask(request(models["tiny"], keep_alive_s=0))
    assert engine.unloaded.wait(60)
    before = mx.get_active_memory()
    engine.unloaded.clear()
    engine.ask(request(models["wide"], prompt_tokens=[5] * 400, max_tokens=20))
    assert engine.scheduler.snapshot.prefix_bytes > MIB
    assert mx.get_active_memory() - before > 30 * MIB
    engine.ask(request(models["wide"], keep_alive_s=0))
    assert engine.unloaded.wait(60)
    assert mx.get_active_memory() - before < MIB / 4


def test_a_time_that_is_none_is_refused(models: dict[str, ModelRef]) -> None:
    with pytest.raises(GryphonError, match="keep_alive_s"):
        check_request(request(models["tiny"], keep_alive_s=math.nan))


def test_the_time_counts_from_the_end_of_the_last_work() -> None:
    keep = KeepAlive(1000)
    remaining = keep.remaining_s()
    assert remaining is not None and 999 < remaining <= 1000
    keep.asked(0)
    assert keep.remaining_s() == 0
    keep.asked(None)
    assert keep.remaining_s() != 0


# The real engine process.


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient()
    yield client
    await client.close()


async def status_of(client: EngineClient) -> EngineStatus:
    status = await client.status()
    assert status is not None
    return status


async def until_unloaded(client: EngineClient) -> EngineStatus:
    deadline = time.monotonic() + 30
    while (status := await status_of(client)).state != "unloaded":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    return status


async def ask(client: EngineClient, asked: GenerationRequest) -> list[Event]:
    return [event async for event in client.stream(asked)]


async def test_the_process_gives_the_memory_back(
    client: EngineClient, models: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident memory after an unload, against that after the unload before it."""
    monkeypatch.setenv("GRYPHON_KEEP_ALIVE", "inf")
    assert isinstance((await ask(client, request(models["wide"], keep_alive_s=0)))[-1], Finished)
    first = await until_unloaded(client)
    process = psutil.Process(first.pid)
    before = process.memory_info().rss
    for number in range(3):
        await ask(client, request(models["wide"]))
        loaded = await status_of(client)
        weights = loaded.weight_bytes
        assert loaded.state == "ready" and weights > 50 * MIB
        assert process.memory_info().rss > before + 0.8 * weights
        await ask(client, request(models["wide"], f"last {number}", keep_alive_s=0))
        status = await until_unloaded(client)
        assert (status.weight_bytes, status.state_bytes, status.prefix_bytes) == (0, 0, 0)
        assert status.model is None and status.active_bytes < MIB
        assert process.memory_info().rss < before + 0.2 * weights


async def test_the_setting_is_the_default_and_a_nonsense_load_is_refused(
    client: EngineClient, models: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("GRYPHON_KEEP_ALIVE", "0")
    await ask(client, request(models["tiny"]))
    status = await until_unloaded(client)
    assert status.footprint_bytes > 0 and status.budget_bytes > 0
    events = client._run(LoadModel("bad", models["tiny"], keep_alive_s=math.nan))
    (only,) = [event async for event in events]
    assert isinstance(only, Failed) and only.code == "invalid_request"
