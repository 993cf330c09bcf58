"""Prompts prepared in several processes: what is slow delays those who sent it, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from app.engine import preparation_pool, waiting
from app.engine.preparation import Prompt
from app.engine.preparation_pool import PROCESSES, PreparationPool
from app.engine.protocol import Message
from app.errors import GryphonError

from ..tiny_models import OPEN_LLAMA, write_model

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
Start = Callable[[Prompt, str], "asyncio.Task[object]"]


@pytest.fixture
async def pool(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PreparationPool]:
    monkeypatch.setattr(preparation_pool, "_START_AFTER_S", 0.0)
    pool = PreparationPool(time_limit_s=60.0)  # longer than any of these tests
    yield pool
    await pool.close()


@pytest.fixture
async def start(pool: PreparationPool) -> AsyncIterator[Start]:
    """Begin preparing a prompt; what has not ended by the end of the test is cancelled."""
    tasks: list[asyncio.Task[object]] = []

    def begin(prompt: Prompt, client: str) -> asyncio.Task[object]:
        tasks.append(asyncio.create_task(pool.prepare(prompt, client)))
        return tasks[-1]

    yield begin
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, GryphonError):
            await task


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("pool") / "tiny", OPEN_LLAMA)


@pytest.fixture(scope="module")
def looping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_model(tmp_path_factory.mktemp("pool") / "looping", OPEN_LLAMA)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": LOOP}))
    return path


def chat(path: Path) -> Prompt:
    return Prompt(str(path), messages=[Message("user", "Hi")])


def text(path: Path, text: str) -> Prompt:
    return Prompt(str(path), text=text)


def busy(pool: PreparationPool) -> int:
    return sum(process.job is not None for process in pool._processes)


async def count(prepared: Awaitable[object]) -> int:
    return len((await prepared).tokens)  # type: ignore[attr-defined]


async def test_templates_that_loop_and_books_do_not_delay_small_prompts(
    pool: PreparationPool, start: Start, model: Path, looping: Path
) -> None:
    """Were one of the looping ones waited for, this test would take longer than it may."""
    for i in range(PROCESSES + 1):
        start(chat(looping), f"{i}")
    for n in range(1, 6):
        assert await count(start(text(model, "a" * n), "other")) == n
        assert await count(start(chat(model), "0")) > 0  # nor others of the same client
    assert busy(pool) == PROCESSES - 1


async def test_large_prompts_leave_a_process_free(
    pool: PreparationPool, start: Start, model: Path, looping: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones that never end: were all processes theirs, the small ones would wait for ever."""
    monkeypatch.setattr(preparation_pool, "_SMALL_BYTES", 1000)
    large = Prompt(str(looping), messages=[Message("user", "x" * 2000)])
    for _ in range(PROCESSES + 1):
        start(large, "large")
    for n in range(1, 4):
        assert await count(start(text(model, "a" * n), "small")) == n
    assert busy(pool) == PROCESSES - 1


async def test_large_prompts_are_prepared_in_the_end(
    pool: PreparationPool, start: Start, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation_pool, "_SMALL_BYTES", 1000)
    large = [start(text(model, "x" * 60_000), "large") for _ in range(PROCESSES + 1)]
    assert [await count(task) for task in large] == [60_000] * len(large)


async def test_a_client_with_many_prompts_does_not_delay_one_with_one(
    pool: PreparationPool, start: Start, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation_pool, "PROCESSES", 2)
    ended: list[str] = []

    def ending(task: asyncio.Task[object], name: str) -> asyncio.Task[object]:
        task.add_done_callback(lambda _: ended.append(name))
        return task

    many = [ending(start(text(model, "x" * 200_000), "many"), f"many {i}") for i in range(8)]
    one = ending(start(text(model, "y" * 200_000), "one"), "one")
    assert await count(one) == 200_000
    assert ended.index("one") <= 1
    await asyncio.gather(*many)
    assert [name for name in ended if name != "one"] == [f"many {i}" for i in range(8)]


async def test_prompts_at_once_each_get_their_own_answer(
    pool: PreparationPool, start: Start, model: Path
) -> None:
    tasks = [start(text(model, "a" * n), f"{n % 4}") for n in range(1, 20)]
    assert [await count(task) for task in tasks] == list(range(1, 20))
    assert 1 <= len(pool._processes) <= PROCESSES and busy(pool) == 0


async def test_one_process_is_enough_for_quick_prompts(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation_pool, "_START_AFTER_S", 3600.0)
    pool = PreparationPool(time_limit_s=60.0)
    prompts = [text(model, "a" * n) for n in range(1, 20)]
    prepared = await asyncio.gather(*(pool.prepare(prompt) for prompt in prompts))
    assert [len(one.tokens) for one in prepared] == list(range(1, 20))
    assert len(pool._processes) == 1
    await pool.close()


async def test_cancelled_while_it_waits_or_works_it_holds_nothing(
    pool: PreparationPool, start: Start, model: Path, looping: Path
) -> None:
    tasks = [start(chat(looping), "a") for _ in range(PROCESSES + 2)]
    while busy(pool) < PROCESSES - 1:
        await asyncio.sleep(0)
    for task in reversed(tasks):  # the waiting ones first
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert busy(pool) == 0 and not pool._waiting
    tasks = [start(text(model, "x" * 40_000), "a") for _ in range(PROCESSES)]
    assert [await count(task) for task in tasks] == [40_000] * PROCESSES


async def test_cancelled_in_the_moment_it_gets_a_process_it_gives_it_back(
    pool: PreparationPool, start: Start, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation_pool, "_START_AFTER_S", 3600.0)  # one process
    first, second = start(text(model, "a"), "a"), start(text(model, "b"), "a")
    genuine = pool._free

    def free(process: preparation_pool._Process) -> None:
        genuine(process)
        if not second.cancelling():
            assert process.job is not None and not second.done()  # given, and not told yet
            second.cancel()

    monkeypatch.setattr(pool, "_free", free)
    assert await count(first) == 1
    with pytest.raises(asyncio.CancelledError):
        await second
    assert busy(pool) == 0
    assert await count(start(text(model, "abc"), "a")) == 3


async def test_the_time_limit_ends_a_prompt_and_no_other(model: Path, looping: Path) -> None:
    pool = PreparationPool(time_limit_s=1.0)
    bad = asyncio.create_task(pool.prepare(chat(looping), "a"))
    assert len((await pool.prepare(text(model, "abc"), "b")).tokens) == 3
    with pytest.raises(GryphonError, match="longer than 1 s"):
        await bad
    assert len((await pool.prepare(text(looping, "abc"), "b")).tokens) == 3
    await pool.close()


async def test_too_many_prompts_are_refused_by_client_and_in_all(
    pool: PreparationPool, start: Start, looping: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MAX_QUEUE", 4)
    monkeypatch.setattr(waiting, "MAX_QUEUE_PER_CLIENT", 2)
    for client in ("a", "b"):
        for _ in range(2 + (PROCESSES - 1) * (client == "a")):
            start(chat(looping), client)
            await asyncio.sleep(0)
        with pytest.raises(GryphonError) as caught:
            await pool.prepare(chat(looping), "a" if client == "a" else "c")
        said = "of this client" if client == "a" else "4 requests are waiting to be prepared"
        assert caught.value.code == "queue_full" and caught.value.retry_after
        assert said in caught.value.message


async def test_idle_processes_end_but_for_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation_pool, "_START_AFTER_S", 0.0)
    pool = PreparationPool(time_limit_s=60.0, idle_s=0.05)
    tasks = [asyncio.create_task(pool.prepare(text(model, "x" * 150_000), "a")) for _ in range(6)]
    seen: set[int] = set()
    while not all(task.done() for task in tasks):
        seen |= {
            process.preparer._process.pid
            for process in pool._processes
            if process.preparer._process is not None
        }
        await asyncio.sleep(0.001)
    assert len(seen) == PROCESSES - 1  # none of these was small
    deadline = time.monotonic() + 20
    while len(pool._processes) > 1 or pool._ending:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    (left,) = pool._processes
    assert left.preparer._process is not None
    for pid in seen - {left.preparer._process.pid}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert len((await pool.prepare(text(model, "abc"))).tokens) == 3
    await pool.close()
