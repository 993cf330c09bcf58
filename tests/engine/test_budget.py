"""The memory budget, on a simulated small machine: what does not fit is refused before it is tried,
pressure sheds the prefix cache, then waits, then refuses, and none of it changes an answer."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from app import machine
from app.engine import room
from app.engine.batch import Row
from app.engine.memory import MemoryBudget
from app.engine.prefix_cache import PrefixCache
from app.engine.protocol import (
    Accepted,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ModelRef,
    Progress,
    Sampling,
    Token,
)
from app.engine.scheduler import Scheduler
from app.machine import RESERVE_BYTES, SystemMemory
from mlxmodels.footprint import MIN_CHUNK, Footprint, footprint

from ..rounds import rounds
from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model

# Wide enough that the state of some hundred tokens is more than a forward call takes.
GROWING = OPEN_LLAMA | {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    root = tmp_path_factory.mktemp("budget")
    configs = {
        "growing": GROWING,
        "griffin": RECURRENT_GEMMA,
        "large": GROWING | {"hidden_size": 512, "num_attention_heads": 8},
    }
    return {
        name: ModelRef(name, str(write_model(root / name, config)))
        for name, config in configs.items()
    }


def plan(model: ModelRef) -> Footprint:
    return footprint(Path(model.path), expand=True)


def budget_for(model: ModelRef, tokens: int, rows: int = 1, chunk: int = MIN_CHUNK) -> int:
    taken = plan(model)
    return taken.weight_bytes + taken.row_bytes(chunk, tokens, rows)


class Asked:
    """One request and what was said to it."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.events: list[Event] = []
        self.accepted = threading.Event()
        self.first_token = threading.Event()
        self.waits = threading.Event()
        self.ended = threading.Event()

    def said(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Accepted):
            self.accepted.set()
        elif isinstance(event, Token):
            self.first_token.set()
        elif isinstance(event, Progress) and event.detail == "waiting for memory":
            self.waits.set()
        elif isinstance(event, (Finished, Failed)):
            self.ended_s = time.monotonic()
            self.ended.set()

    @property
    def end(self) -> Finished | Failed:
        assert self.ended.wait(timeout=120), self.events
        (end,) = [event for event in self.events if isinstance(event, (Finished, Failed))]
        return end

    @property
    def failure(self) -> Failed:
        assert isinstance(self.end, Failed), self.end
        return self.end

    def answer(self) -> list[int]:
        assert isinstance(self.end, Finished), self.end
        return [event.token_id for event in self.events if isinstance(event, Token)]

    @property
    def acceptance(self) -> Accepted:
        assert self.accepted.wait(timeout=120), self.events
        (event,) = [event for event in self.events if isinstance(event, Accepted)]
        return event


class Engine:
    """A scheduler on its own thread."""

    def __init__(self, memory_bytes: int | None, **options: Any) -> None:
        self.scheduler = Scheduler(memory_bytes=memory_bytes, **options)
        self._thread = threading.Thread(target=self.scheduler.run, daemon=True)
        self._thread.start()
        self._count = 0

    def ask(self, model: ModelRef, prompt: int | list[int], **fields: Any) -> Asked:
        self._count += 1
        fields = {"max_tokens": 8, "sampling": Sampling(temperature=0)} | fields
        request = GenerationRequest(id=f"{self._count}", model=model, prompt_tokens=[0], **fields)
        tokens = tokens_of(prompt) if isinstance(prompt, int) else prompt
        asked = Asked(Row(request, lambda event: asked.said(event), tokens))
        self.scheduler.submit(asked.row)
        return asked

    def close(self) -> None:
        self.scheduler.stop()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def engine(memory_bytes: int | None, **options: Any) -> Iterator[Engine]:
    running = Engine(memory_bytes, **options)
    try:
        yield running
    finally:
        running.close()


def tokens_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(256), k=length)


def alone(model: ModelRef, prompt: int | list[int], **fields: Any) -> list[int]:
    with engine(None) as unlimited:
        return unlimited.ask(model, prompt, **fields).answer()


# Before loading.


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded_and_the_other_stays(
    models: dict[str, ModelRef],
) -> None:
    assert budget_for(models["growing"], 512) < plan(models["large"]).weight_bytes
    with engine(budget_for(models["growing"], 512)) as small:
        small.ask(models["growing"], 5).answer()
        weights = small.scheduler.snapshot.weight_bytes
        refused = small.ask(models["large"], 5)
        failure = refused.failure
        assert failure.code == "does_not_fit" and failure.retry_after is None
        for term in ("weights take", "256 tokens", "computing", "available", "left to"):
            assert term in failure.message
        assert not [event for event in refused.events if isinstance(event, Progress)]
        again = small.ask(models["growing"], 5)
        again.answer()
        assert not [event for event in again.events if isinstance(event, Progress)], "loaded again"
        view = small.scheduler.snapshot
        assert view.model == models["growing"] and view.weight_bytes == weights


# Before admission.


def test_a_prompt_that_never_fits_is_refused_at_once_with_the_arithmetic(
    models: dict[str, ModelRef],
) -> None:
    with engine(budget_for(models["growing"], 400)) as small:
        running = small.ask(models["growing"], 5, max_tokens=300)
        assert running.first_token.wait(60)
        failure = small.ask(models["growing"], 3000).failure
        assert not running.ended.is_set(), "it waited for the other"
        assert failure.code == "does_not_fit" and failure.retry_after is None
        for term in ("3000 tokens", "weights of growing", "state", "may hold", "room for"):
            assert term in failure.message
        running.answer()


def test_a_prompt_beyond_the_context_is_told_of_the_context_not_of_memory(
    models: dict[str, ModelRef],
) -> None:
    with engine(budget_for(models["growing"], 400)) as small:
        assert small.ask(models["growing"], 5000).failure.code == "context_length_exceeded"


def test_an_answer_has_the_context_that_memory_has_room_for(models: dict[str, ModelRef]) -> None:
    """It ends by "length", as at the end of the model's own context, and that is said before."""
    with engine(budget_for(models["growing"], 400)) as small:
        asked = small.ask(models["growing"], 100, max_tokens=None)
        assert isinstance(asked.end, Finished) and asked.end.reason == "length"
        context = asked.acceptance.context_length
        assert context is not None and 400 <= context < 512
        assert len(asked.answer()) == context - 100
        assert f"memory for {context} tokens" in asked.acceptance.notice
        assert small.scheduler.snapshot.context_length == context
        assert small.ask(models["growing"], 100).acceptance.notice == ""


def test_memory_sets_no_limit_to_a_state_that_does_not_grow(models: dict[str, ModelRef]) -> None:
    griffin = models["griffin"]
    expected = alone(griffin, 900, max_tokens=40)
    with engine(budget_for(griffin, 300)) as small:
        asked = small.ask(griffin, 900, max_tokens=40)
        assert asked.answer() == expected and asked.acceptance.context_length is None


# Under pressure.


def test_the_prefill_step_shrinks_before_a_request_is_refused(models: dict[str, ModelRef]) -> None:
    model = models["growing"]
    expected = alone(model, 1000)
    with engine(budget_for(model, 1020)) as small:
        asked = small.ask(model, 1000)
        assert asked.answer() == expected
        read = [e.processed for e in asked.events if isinstance(e, Progress) and e.total == 1000]
        steps = [after - before for before, after in zip(read, read[1:], strict=False)]
        assert steps and max(steps) < 128 and min(steps[:-1]) >= MIN_CHUNK


def test_the_prefix_cache_goes_first_and_nobody_waits(models: dict[str, ModelRef]) -> None:
    model = models["growing"]
    with engine(budget_for(model, 900, chunk=128), prefix_cache_bytes=2**30) as small:
        for seed in range(5):
            small.ask(model, tokens_of(120, seed)).answer()
        kept = small.scheduler.snapshot.prefix_bytes
        assert kept > plan(model).state_bytes(256)
        asked = small.ask(model, 800)
        asked.answer()
        assert not asked.waits.is_set()
        assert small.scheduler.snapshot.prefix_bytes < kept


def test_the_prefix_cache_may_have_what_running_rows_leave(models: dict[str, ModelRef]) -> None:
    taken, prefixes = plan(models["growing"]), PrefixCache(2**30)
    free = 3 * taken.row_bytes(128, 600)
    budget = MemoryBudget(taken.weight_bytes + free)
    account = room.Room(budget, taken, "growing", taken.weight_bytes, prefixes, 128)
    account.limit_prefixes([])
    assert prefixes.budget_bytes == free - taken.row_bytes(128, 0, rows=0)
    request = GenerationRequest(id="r", model=models["growing"], prompt_tokens=[0], max_tokens=100)
    row = Row(request, lambda event: None, tokens_of(500))
    account.limit_prefixes([row])
    assert prefixes.budget_bytes == free - taken.row_bytes(128, 600)
    account.limit_prefixes([row] * 16)
    assert prefixes.budget_bytes == 0


def test_a_request_waits_for_the_memory_of_another_and_is_answered_alike(
    models: dict[str, ModelRef],
) -> None:
    model = models["growing"]
    expected = alone(model, 700)
    with engine(budget_for(model, 1000)) as small:
        first = small.ask(model, 600, max_tokens=200)
        assert first.first_token.wait(60)
        second = small.ask(model, 700)
        assert second.waits.wait(60) and not first.ended.is_set()
        assert second.answer() == expected
        assert first.ended.is_set() and len(first.answer()) == 200


def test_who_waits_too_long_is_told_when_to_come_again(
    models: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_WAIT_S", 0.05)
    model = models["growing"]
    with engine(budget_for(model, 1000)) as small:
        first = small.ask(model, 600, max_tokens=None)
        assert first.first_token.wait(60)
        failure = small.ask(model, 700).failure
        assert failure.code == "out_of_memory" and failure.retry_after
        assert not first.ended.is_set()
        small.scheduler.cancel(first.row)
        small.ask(model, 700).answer()


def test_who_waited_for_memory_in_vain_had_a_turn(
    models: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each of a client's large requests holds up everybody for that long."""
    monkeypatch.setattr(room, "MAX_WAIT_S", 0.1)
    model = models["growing"]
    with engine(budget_for(model, 1000)) as small:
        running = small.ask(model, 600, max_tokens=None, client="ann")
        assert running.first_token.wait(60)
        large = [small.ask(model, 700, client="bob") for _ in range(3)]
        assert large[0].waits.wait(60)
        little = small.ask(model, 5, client="cleo")
        for each in (*large, little):
            assert each.failure.code == "out_of_memory"
        assert large[0].ended_s < little.ended_s < large[1].ended_s
        small.scheduler.cancel(running.row)


def test_rows_that_outgrow_the_budget_end_newest_first_and_the_others_are_as_alone(
    models: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each was admitted with room for a modest answer; together they want more than there is."""
    monkeypatch.setattr(room, "_MODEST_ANSWER", 64)
    model, prompts = models["growing"], [tokens_of(40, seed) for seed in range(3)]
    expected = [alone(model, prompt, max_tokens=260) for prompt in prompts[:2]]
    with engine(budget_for(model, 256, rows=3)) as small:
        asked = []
        for prompt in prompts:
            asked.append(small.ask(model, prompt, max_tokens=260))
            assert asked[-1].first_token.wait(60)
        failure = asked[2].failure
        assert failure.code == "out_of_memory" and failure.retry_after
        assert "3 requests" in failure.message and "the newest" in failure.message
        assert [each.answer() for each in asked[:2]] == expected
        assert small.scheduler.snapshot.state_bytes == 0


def test_what_other_programs_take_is_told_and_a_tiny_request_recovers_within_2_s(
    models: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, total = models["growing"], machine.system_memory().total_bytes
    # Less than nothing is left, whatever MLX keeps of freed buffers.
    short = SystemMemory(total, RESERVE_BYTES - 2**26)
    genuine = machine.system_memory
    with engine(None) as shared:
        shared.ask(model, 5).answer()
        monkeypatch.setattr(machine, "system_memory", lambda: short)
        waits_until = time.monotonic() + 60
        while shared.scheduler.snapshot.budget_bytes > mx.get_active_memory() + 1000:
            assert time.monotonic() < waits_until
            shared.ask(model, 1, max_tokens=1).ended.wait(60)  # a turn in which it looks
        failure = shared.ask(model, 5).failure
        assert failure.code == "out_of_memory" and failure.retry_after
        assert "other programs leave" in failure.message
        monkeypatch.setattr(machine, "system_memory", genuine)
        over = time.monotonic()
        while isinstance(end := shared.ask(model, 5).end, Failed):
            assert end.retry_after is not None
            time.sleep(end.retry_after)
        assert time.monotonic() - over < 2


@pytest.mark.parametrize("number", rounds(2))
@pytest.mark.parametrize("name", ["growing", "griffin"])
def test_whatever_comes_mlx_never_holds_more_than_the_budget(
    models: dict[str, ModelRef], name: str, number: int
) -> None:
    """The account against the allocator's own: random prompts, answers and cancels."""
    draw, model = random.Random(f"{name} {number}"), models[name]
    budget = budget_for(model, 700, rows=3, chunk=64)
    mx.clear_cache()
    before = mx.get_active_memory()
    with engine(budget, prefix_cache_bytes=2**30) as small:
        small.ask(model, 1).answer()  # loading is checked by its own arithmetic
        mx.reset_peak_memory()
        asked = []
        for index in range(16):
            prompt = tokens_of(draw.choice((1, 40, 200, 450)), draw.randint(0, 3))
            asked.append(small.ask(model, prompt, max_tokens=draw.choice((1, 30, 150, None))))
            if draw.random() < 0.3:
                small.scheduler.cancel(draw.choice(asked).row)
            if index % 4 == 3:
                small.scheduler.cancel(asked[-4].row)
                assert asked[-4].ended.wait(120)
        for each in asked:
            if each.row.generation.max_tokens is None:
                small.scheduler.cancel(each.row)
            assert isinstance(each.end, Finished) or each.failure.code == "out_of_memory"
        assert mx.get_peak_memory() - before <= budget
        assert small.scheduler.snapshot.running == 0
