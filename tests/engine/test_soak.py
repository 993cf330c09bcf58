"""Random load on a small simulated machine, for a while: cancels, clients that vanish, models that
take turns. Then nothing of it is left: no row, no snapshot, and no memory."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from app.engine.client import EngineClient
from app.engine.protocol import (
    EngineStatus,
    Failed,
    Finished,
    GenerationRequest,
    Message,
    ModelRef,
    Progress,
    Sampling,
    Token,
)
from mlxmodels.footprint import footprint

from ..rounds import SCALE
from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model

# Ten minutes at the scale of `scripts/prove --full`.
SECONDS = 24 * SCALE if SCALE > 1 else 6
WARM_UP_SECONDS = 60 if SCALE > 1 else 5
AT_A_TIME = 8
# What a request may be told: pressure is what this is about.
REFUSALS = {"out_of_memory", "queue_full", "does_not_fit", "engine_stopped"}
CONTEXT = 4096


class Load:
    """Requests without end from some clients of one engine, until told to stop."""

    def __init__(self, draw: random.Random, models: list[ModelRef]) -> None:
        self.counted: collections.Counter[str] = collections.Counter()
        self._draw = draw
        self._models = models
        self._clients = [EngineClient() for _ in range(3)]
        self._stop = False

    @property
    def owner(self) -> EngineClient:
        return self._clients[0]

    async def run(self, seconds: float) -> None:
        await self.owner.start()
        self._stop = False
        people = [asyncio.create_task(self._person(number)) for number in range(AT_A_TIME)]
        watching = asyncio.create_task(self._watch())
        await asyncio.sleep(seconds)
        self._stop = True
        for end in await asyncio.gather(*people, watching, return_exceptions=True):
            if isinstance(end, BaseException):
                raise end

    async def close(self) -> None:
        for client in reversed(self._clients):
            await client.close()

    async def status(self) -> EngineStatus:
        status = await self.owner.status()
        assert status is not None
        return status

    async def _watch(self) -> None:
        while not self._stop:
            status = await self.status()
            held = status.weight_bytes + status.state_bytes + status.prefix_bytes
            assert held <= status.budget_bytes, status
            self.counted["looks"] += 1
            await asyncio.sleep(0.05)

    async def _person(self, number: int) -> None:
        draw = random.Random(f"{number} {self._draw.random()}")
        while not self._stop:
            which = number % len(self._clients)
            if which and draw.random() < 0.15:  # its other requests end with it
                gone, self._clients[which] = self._clients[which], EngineClient()
                await gone.close()
                self.counted["disconnects"] += 1
            await self._ask(draw, self._clients[which], f"{number} {self.counted['requests']}")

    async def _ask(self, draw: random.Random, client: EngineClient, name: str) -> None:
        self.counted["requests"] += 1
        ending = draw.choice(("by itself", "by itself", "cancelled", "left"))
        after = draw.randint(0, 12)
        end: Finished | Failed | None = None
        tokens = 0
        stream = client.stream(self._request(draw, name))
        async with contextlib.aclosing(stream):  # type: ignore[type-var]
            async for event in stream:
                assert end is None, "something came after the end"
                tokens += isinstance(event, Token)
                if isinstance(event, (Finished, Failed)):
                    end = event
                elif isinstance(event, Progress):
                    self.counted["waits"] += event.detail == "waiting for memory"
                elif tokens >= after and ending == "cancelled":
                    await client.cancel(name)
                elif tokens >= after and ending == "left":
                    self.counted["left"] += 1
                    return
        if isinstance(end, Failed):
            assert end.code in REFUSALS, end
            self.counted[end.code] += 1
            if end.retry_after and not self._stop:
                await asyncio.sleep(end.retry_after / 4)
        else:
            assert isinstance(end, Finished)
            self.counted[f"ended by {end.reason}"] += 1

    def _request(self, draw: random.Random, name: str) -> GenerationRequest:
        tokens = draw.choices(range(256), k=draw.choice((1, 7, 40, 200, 700, 700, CONTEXT - 50)))
        words: dict[str, object] = draw.choice(
            (
                {"prompt_tokens": tokens},
                {"prompt_tokens": list(range(100)) + tokens[:100]},
                {"prompt": "Once upon a time " * draw.randint(1, 20)},
                {"messages": [Message("user", "Why is the sky blue?")]},
            )
        )
        return GenerationRequest(
            id=name,
            model=draw.choices(self._models, weights=(20, 3, 1))[0],
            sampling=Sampling(temperature=draw.choice((0.0, 1.0)), seed=draw.randint(0, 9)),
            max_tokens=draw.choice((1, 10, 60, 200)),
            **words,  # type: ignore[arg-type]
        )

    async def unload(self) -> EngineStatus:
        """The engine without its model."""
        small = GenerationRequest(
            id="last", model=self._models[0], prompt_tokens=[1], max_tokens=1, keep_alive_s=0
        )
        async for event in self.owner.stream(small):
            assert not isinstance(event, Failed), event
        deadline = time.monotonic() + 30
        while (status := await self.status()).state != "unloaded":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        return status


@pytest.mark.timeout(max(180, 4 * SECONDS))
async def test_nothing_is_left_of_a_long_random_load(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    growing = OPEN_LLAMA | {"hidden_size": 64, "max_position_embeddings": CONTEXT}
    configs = {
        "growing": growing,
        "griffin": RECURRENT_GEMMA,
        "large": growing | {"vocab_size": 300_000},
    }
    paths = {name: write_model(tmp_path / name, config) for name, config in configs.items()}
    models = [ModelRef(name, str(path)) for name, path in paths.items()]
    taken = footprint(paths["growing"], expand=True)
    # One long prompt or some short ones; none of a whole context, nor the largest model.
    budget = taken.weight_bytes + taken.row_bytes(64, 1300)
    assert footprint(paths["large"], expand=True).least_bytes > budget
    monkeypatch.setenv("GRYPHON_MEMORY_BYTES", str(budget))
    monkeypatch.setenv("GRYPHON_KEEP_ALIVE", "inf")
    load = Load(random.Random(SCALE), models)
    try:
        # Resident memory after an unload varies by 2 or 3 of 57 MB: the start is the most of a few.
        before = 0
        for _ in range(3):
            await load.run(WARM_UP_SECONDS / 3)
            process = psutil.Process((await load.unload()).pid)
            before = max(before, process.memory_info().rss)
        await load.run(SECONDS)
        status = await load.status()
        deadline = time.monotonic() + 10
        while status.running or status.queued:  # what clients left behind is cancelled by now
            assert time.monotonic() < deadline, status
            await asyncio.sleep(0.02)
            status = await load.status()
        assert status.pid == process.pid, "the engine was started again"
        assert status.state_bytes == status.scratch_bytes == 0
        unexplained = status.active_bytes - status.weight_bytes - status.prefix_bytes
        assert abs(unexplained) < 2**18, status
        status = await load.unload()
        assert (status.running, status.queued, status.prefix_bytes) == (0, 0, 0)
        assert status.active_bytes < 2**18
        after = process.memory_info().rss
        assert after <= 1.05 * before, (before, after)
    finally:
        await load.close()
    for name in ("requests", "disconnects", "left", "looks", "ended by cancelled", "waits"):
        assert load.counted[name], (name, load.counted)
    counts = ("requests", "left", "disconnects", "ended by cancelled", "waits")
    for name in (*counts, *sorted(REFUSALS)):
        record_property(name.replace(" ", "_"), load.counted[name])
    record_property("resident_KiB_before", before // 1024)
    record_property("resident_KiB_after", after // 1024)
