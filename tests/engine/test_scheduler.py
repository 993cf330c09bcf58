"""The scheduler with real (tiny) models: what it says, in which order, and that every request ends
exactly once. That a row in a batch is that row alone: `test_batch_equals_single.py`."""

from __future__ import annotations

import dataclasses
import math
import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

import mlxmodels
from app.engine import residency, waiting
from app.engine import scheduler as scheduling
from app.engine.admission import PREFILL_CHUNK
from app.engine.batch import Batch, Launch, Row
from app.engine.protocol import (
    Accepted,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    LoadModel,
    ModelRef,
    Progress,
    PromptLookup,
    Sampling,
    Token,
)
from app.engine.resident import load_resident
from app.engine.sampling import logprobs_of
from app.engine.scheduler import Scheduler

from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model

FAMILIES = {"open_llama": OPEN_LLAMA, "recurrent_gemma": RECURRENT_GEMMA}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: ModelRef(name, str(write_model(root / name, config)))
        for name, config in FAMILIES.items()
    }


class Harness:
    """A scheduler on its own thread, and everything it says."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.rows: dict[str, Row] = {}
        self.said: dict[str, list[Event]] = {}
        self._thread = threading.Thread(target=self.scheduler.run, daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest | LoadModel, prompt: list[int]) -> Row:
        row = Row(request, self.events.put, prompt)
        self.rows[request.id] = row
        self.said[request.id] = []
        self.scheduler.submit(row)
        return row

    def next(self) -> Event:
        event = self.events.get(timeout=60)
        self.said[event.id].append(event)
        return event

    def wait_all(self) -> None:
        while not all(self.ended(request_id) for request_id in self.said):
            self.next()

    def ended(self, request_id: str) -> bool:
        return any(isinstance(e, (Finished, Failed)) for e in self.said[request_id])

    def tokens(self, request_id: str) -> list[int]:
        return [e.token_id for e in self.said[request_id] if isinstance(e, Token)]

    def close(self) -> None:
        self.scheduler.stop()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()
        while not self.events.empty():
            self.next()
        for request_id, events in self.said.items():
            terminal = [e for e in events if isinstance(e, (Finished, Failed))]
            assert len(terminal) <= 1, f"{request_id} ended {len(terminal)} times"
            assert terminal == events[-1:] or not terminal, f"{request_id} went on after its end"


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.close()


def request(model: ModelRef, id: str, **fields: Any) -> GenerationRequest:
    fields.setdefault("sampling", Sampling(temperature=0))
    fields.setdefault("max_tokens", 12)
    return GenerationRequest(id=id, model=model, prompt_tokens=[0], **fields)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(256), k=length)


def alone(harness: Harness, base: GenerationRequest, prompt: list[int]) -> list[int]:
    lone = msgspec.structs.replace(base, id=f"alone-{base.id}")
    harness.submit(lone, prompt)
    while not harness.ended(lone.id):
        harness.next()
    return harness.tokens(lone.id)


def test_a_prompt_in_chunks_gives_the_logits_of_the_whole_prompt_with_dynamic_scaling(
    harness: Harness, tmp_path: Path
) -> None:
    """Open-Llama's rotary base depends on the length: every chunk must use the whole prompt's."""
    scaling = {"type": "dynamic", "factor": 8.0}
    path = write_model(
        tmp_path / "dynamic", OPEN_LLAMA, max_position_embeddings=64, rope_scaling=scaling
    )
    model = request(ModelRef("dynamic", str(path)), "a", logprobs=True, max_tokens=1)
    harness.submit(model, prompt_of(300))
    harness.wait_all()
    (token,) = [e for e in harness.said["a"] if isinstance(e, Token)]
    loaded = mlxmodels.load(path)
    whole = logprobs_of(loaded.model(mx.array([prompt_of(300)]))[:, -1])[0]
    assert token.token_id == mx.argmax(whole).item()
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(whole[token.token_id].item(), abs=1e-4)


def test_a_prompt_of_several_chunks_is_reported_as_it_is_read(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    harness.submit(request(checkpoints["open_llama"], "a"), prompt_of(300))
    harness.wait_all()
    read = [
        e.processed for e in harness.said["a"] if isinstance(e, Progress) and e.phase == "prefill"
    ]
    chunk = PREFILL_CHUNK[mx.default_device().type]
    assert read == [*range(chunk + 1, 300, chunk), 300]
    assert [type(e) for e in harness.said["a"][:3]] == [Progress, Progress, Accepted]  # load, then


def test_a_running_row_waits_one_chunk_at_most_for_a_newcomer(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    harness.submit(request(checkpoints["open_llama"], "old", max_tokens=200), prompt_of(5))
    while not harness.tokens("old"):
        harness.next()
    harness.submit(request(checkpoints["open_llama"], "new"), prompt_of(500))
    order: list[str] = []
    while not harness.tokens("new"):
        event = harness.next()
        if isinstance(event, Token) or (isinstance(event, Progress) and event.phase == "prefill"):
            order.append(event.id)
    for first, second in zip(order, order[1:], strict=False):
        assert (first, second) != ("new", "new"), f"two chunks with no token between: {order}"


class Recorded:
    """A model that notes how many rows and tokens each call of it has."""

    def __init__(self, model: Any, calls: list[tuple[int, int]]) -> None:
        self._model = model
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, inputs: mx.array, **options: Any) -> mx.array:
        self._calls.append((inputs.shape[0], inputs.shape[1]))
        return self._model(inputs, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_chunk_at_most_is_computed_between_two_steps_however_many_prompts_wait(
    checkpoints: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Also where chunks are cut up to keep the states, and from one prompt to the next."""
    calls: list[tuple[int, int]] = []

    def recorded(*arguments: Any) -> Any:
        resident = load_resident(*arguments)
        model = Recorded(resident.loaded.model, calls)
        return dataclasses.replace(
            resident, loaded=dataclasses.replace(resident.loaded, model=model)
        )

    genuine, on_top = Batch.join, list[str]()

    def join(self: Batch, row: Row) -> None:
        if len(row.prompt) > chunk and self.rows and is_chunk(calls[-1]):
            on_top.append(row.request.id)
        genuine(self, row)

    def is_chunk(call: tuple[int, int]) -> bool:
        return call[0] == 1 and call[1] > 1  # no chunk of these prompts has one token

    monkeypatch.setattr(Batch, "join", join)
    monkeypatch.setattr(residency, "load_resident", recorded)
    chunk = PREFILL_CHUNK[mx.default_device().type]
    scheduler = Scheduler(prefix_cache_bytes=2**24)
    model, ended = checkpoints[family], list[str]()
    lengths = {"b": 402, "c": 9, "d": 301, "e": 296, "f": 403}

    def happened(event: Event) -> None:
        if isinstance(event, Token) and event.id == "a" and len(calls) == 3:
            for i, (id, length) in enumerate(lengths.items()):
                row = Row(request(model, id, max_tokens=5), happened, prompt_of(length, i))
                row.boundaries = [length // 3, length * 2 // 3]
                scheduler.submit(row)
        elif isinstance(event, (Finished, Failed)):
            ended.append(event.id)
            assert isinstance(event, Finished)
            if len(ended) == 1 + len(lengths):
                scheduler.stop()

    scheduler.submit(Row(request(model, "a", max_tokens=80), happened, prompt_of(5)))
    scheduler.run()
    assert sorted(ended) == ["a", *lengths]
    assert not on_top, "states were copied in the turn of a chunk"
    prefilled = [0]
    for call in calls:
        if is_chunk(call):
            prefilled[-1] += call[1]
        else:
            prefilled.append(0)
    # The first prompt had nobody to delay; from then on a row is running.
    assert max(prefilled) <= chunk
    assert sum(prefilled) == 4 + sum(length - 1 for length in lengths.values())
    assert sum(count > 0 for count in prefilled) >= 1 + sum(
        math.ceil((length - 1) / chunk) for length in lengths.values()
    )


def test_short_prompts_share_a_chunk_and_one_that_does_not_fit_waits_whole(
    checkpoints: dict[str, ModelRef],
) -> None:
    """Otherwise a burst of n requests costs n decode steps that are mostly empty."""
    scheduler = Scheduler()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    third = PREFILL_CHUNK[mx.default_device().type] // 3
    lengths = {"a": third, "b": third, "c": third + 1, "d": third}
    for id, length in lengths.items():  # all are there before the first turn
        prompt = prompt_of(length)
        model = checkpoints["open_llama"]
        scheduler.submit(Row(request(model, id, max_tokens=4), events.put, prompt))
    thread = threading.Thread(target=scheduler.run, daemon=True)
    thread.start()
    order = ""
    ended = 0
    while ended < len(lengths):
        event = events.get(timeout=60)
        order += event.id if isinstance(event, Token) else ""
        ended += isinstance(event, (Finished, Failed))
    scheduler.stop()
    thread.join(timeout=60)
    assert order == "abc" + "abcd" * 3 + "d"


def test_finish_reasons_and_counts(harness: Harness, checkpoints: dict[str, ModelRef]) -> None:
    model = checkpoints["open_llama"]
    harness.submit(request(model, "length", max_tokens=3), prompt_of(4))
    harness.wait_all()
    end = harness.said["length"][-1]
    assert isinstance(end, Finished)
    assert (end.reason, end.usage.prompt_tokens, end.usage.completion_tokens) == ("length", 4, 3)
    assert end.timings.prefill_s > 0 and end.timings.decode_s > 0


def test_max_tokens_of_one_gives_one_token(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    harness.submit(request(checkpoints["recurrent_gemma"], "a", max_tokens=1), prompt_of(1))
    harness.wait_all()
    assert len(harness.tokens("a")) == 1


def test_the_end_of_sequence_token_ends_and_leaves_no_text(
    harness: Harness, checkpoints: dict[str, ModelRef], tmp_path: Path
) -> None:
    """The same weights with the third greedy token declared to be the end."""
    free = alone(harness, request(checkpoints["open_llama"], "free"), prompt_of(6))
    third = free[2]
    path = write_model(tmp_path / "eos", OPEN_LLAMA, eos_token_id=third)
    harness.submit(request(ModelRef("eos", str(path)), "a"), prompt_of(6))
    harness.wait_all()
    assert harness.tokens("a") == free[: free.index(third)]
    assert harness.said["a"][-1].reason == "stop"  # type: ignore[union-attr]


def test_the_answer_ends_where_the_context_does(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    model = checkpoints["open_llama"]
    for limit in (None, 1000):
        harness.submit(request(model, f"{limit}", max_tokens=limit), prompt_of(509))
    harness.wait_all()
    for limit in (None, 1000):
        end = harness.said[f"{limit}"][-1]
        assert isinstance(end, Finished)
        assert (end.reason, end.usage.completion_tokens) == ("length", 3)


def test_a_prompt_longer_than_the_context_is_refused_with_both_counts(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    harness.submit(request(checkpoints["open_llama"], "a"), prompt_of(512))
    harness.wait_all()
    failed = harness.said["a"][-1]
    assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"
    assert "512 tokens" in failed.message and "room for 512" in failed.message


def test_recurrent_gemma_has_no_context_limit(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    harness.submit(request(checkpoints["recurrent_gemma"], "a"), prompt_of(2000))
    harness.wait_all()
    accepted = next(e for e in harness.said["a"] if isinstance(e, Accepted))
    assert accepted.context_length is None
    assert len(harness.tokens("a")) == 12


@pytest.mark.parametrize("tokens", [[1, 259], [-1]])
def test_token_ids_outside_the_vocabulary_are_refused(
    harness: Harness, checkpoints: dict[str, ModelRef], tokens: list[int]
) -> None:
    harness.submit(request(checkpoints["open_llama"], "a"), tokens)
    harness.wait_all()
    failed = harness.said["a"][-1]
    assert isinstance(failed, Failed) and "0 to 258" in failed.message


def test_cancelling_ends_a_row_and_leaves_the_others_as_they_were(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    model = checkpoints["recurrent_gemma"]
    expected = alone(harness, request(model, "b", max_tokens=30), prompt_of(9))
    for request_id in ("a", "b", "c"):
        harness.submit(request(model, request_id, max_tokens=30), prompt_of(9))
    while len(harness.tokens("c")) < 3:
        harness.next()
    harness.scheduler.cancel(harness.rows["a"])
    harness.wait_all()
    end = harness.said["a"][-1]
    assert isinstance(end, Finished) and end.reason == "cancelled"
    assert end.usage.completion_tokens == len(harness.tokens("a")) < 30
    assert harness.tokens("b") == harness.tokens("c") == expected


def test_cancelling_in_the_queue_and_twice_is_one_end(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    model = checkpoints["open_llama"]
    harness.submit(request(model, "long", max_tokens=100), prompt_of(400))
    row = harness.submit(request(model, "waiting"), prompt_of(400))
    harness.scheduler.cancel(row)
    harness.scheduler.cancel(row)
    harness.wait_all()
    end = harness.said["waiting"][-1]
    assert isinstance(end, Finished) and end.reason == "cancelled"


def test_a_full_queue_refuses_with_retry_after(
    harness: Harness, checkpoints: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MAX_QUEUE", 2)
    monkeypatch.setattr(scheduling, "MAX_ROWS", 1)
    model = checkpoints["open_llama"]
    for i in range(6):
        harness.submit(request(model, f"r{i}", max_tokens=60), prompt_of(200))
    harness.wait_all()
    ends = [harness.said[f"r{i}"][-1] for i in range(6)]
    refused = [e for e in ends if isinstance(e, Failed)]
    assert refused and all(e.code == "queue_full" and e.retry_after for e in refused)
    assert all("of 2 at most" in e.message for e in refused)
    assert any(isinstance(e, Finished) for e in ends)


def test_another_model_waits_for_running_rows_then_takes_over(
    harness: Harness, checkpoints: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MAX_TURN_S", 0)  # the first model has had its turn
    first, second = checkpoints["open_llama"], checkpoints["recurrent_gemma"]
    harness.submit(request(first, "a", max_tokens=40), prompt_of(5))
    while not harness.tokens("a"):
        harness.next()
    harness.submit(request(second, "b"), prompt_of(5))
    harness.submit(request(first, "c"), prompt_of(5))  # behind b: no starvation
    seen: list[str] = []
    while not all(harness.ended(request_id) for request_id in harness.said):
        event = harness.next()
        if isinstance(event, Finished):
            seen.append(event.id)
    assert seen == ["a", "b", "c"]
    phases = [e.phase for e in harness.said["b"] if isinstance(e, Progress)]
    assert phases == ["swap", "load", "load"]
    assert "open_llama" in next(e.detail for e in harness.said["b"] if isinstance(e, Progress))


def test_a_request_that_will_not_wait_is_refused_while_another_model_runs(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    harness.submit(request(checkpoints["open_llama"], "a", max_tokens=60), prompt_of(5))
    while not harness.tokens("a"):
        harness.next()
    harness.submit(request(checkpoints["recurrent_gemma"], "b", wait_for_model=False), prompt_of(5))
    harness.wait_all()
    failed = harness.said["b"][-1]
    assert isinstance(failed, Failed) and failed.code == "model_busy"
    assert len(harness.tokens("a")) == 60
    # With nothing running the same request swaps at once.
    harness.submit(request(checkpoints["recurrent_gemma"], "c", wait_for_model=False), prompt_of(5))
    harness.wait_all()
    assert isinstance(harness.said["c"][-1], Finished)


def test_loading_a_model_that_is_broken_fails_everyone_who_waits_for_it_and_nobody_else(
    harness: Harness, checkpoints: dict[str, ModelRef], tmp_path: Path
) -> None:
    path = write_model(tmp_path / "broken", OPEN_LLAMA)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    broken = ModelRef("broken", str(path))
    harness.submit(request(broken, "a"), prompt_of(5))
    harness.submit(LoadModel("b", broken), [])
    harness.submit(request(checkpoints["open_llama"], "c"), prompt_of(5))
    harness.wait_all()
    for request_id in ("a", "b"):
        failed = harness.said[request_id][-1]
        assert isinstance(failed, Failed) and failed.code == "invalid_model"
        assert "model.safetensors" in failed.message
    assert isinstance(harness.said["c"][-1], Finished)


def test_load_makes_a_model_resident_without_generating(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    harness.submit(LoadModel("a", checkpoints["recurrent_gemma"]), [])
    harness.submit(LoadModel("b", checkpoints["recurrent_gemma"]), [])
    harness.wait_all()
    assert [type(e) for e in harness.said["a"]] == [Progress, Progress, Finished]
    harness.scheduler.submit(Row(LoadModel("c", checkpoints["recurrent_gemma"]), lambda _: None))
    harness.submit(request(checkpoints["recurrent_gemma"], "d"), prompt_of(3))
    harness.wait_all()
    assert not any(isinstance(e, Progress) and e.phase == "load" for e in harness.said["d"])


@pytest.mark.parametrize("speculation", [None, PromptLookup()])
def test_an_answer_of_what_is_no_number_is_refused(
    harness: Harness, tmp_path: Path, speculation: PromptLookup | None
) -> None:
    path = write_model(tmp_path / "broken", OPEN_LLAMA)
    weights = mx.load(str(path / "model.safetensors"))
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name] = weights[name] * mx.nan
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    asked = request(ModelRef("broken", str(path)), "a", speculation=speculation)
    harness.submit(asked, prompt_of(4))
    harness.wait_all()
    failed = harness.said["a"][-1]
    assert isinstance(failed, Failed) and failed.code == "invalid_numbers"
    assert "broken" in failed.message and not harness.tokens("a")


def test_an_exception_in_a_step_ends_its_rows_and_the_engine_goes_on(
    harness: Harness, checkpoints: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = Batch.forward

    def failing(self: Batch, model: Any) -> Any:
        if any(row.request.id == "bad" for row in self.rows):
            raise RuntimeError("out of paper")
        return genuine(self, model)

    monkeypatch.setattr(Batch, "forward", failing)
    harness.submit(request(checkpoints["open_llama"], "bad"), prompt_of(5))
    harness.wait_all()
    failed = harness.said["bad"][-1]
    assert isinstance(failed, Failed) and failed.code == "engine_error"
    assert "out of paper" in failed.message
    harness.submit(request(checkpoints["open_llama"], "good"), prompt_of(5))
    harness.wait_all()
    assert isinstance(harness.said["good"][-1], Finished)


def test_an_error_in_a_prefill_costs_no_other_row_a_token(
    harness: Harness, checkpoints: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while the step in flight has a row that has ended, as after every end."""
    model = checkpoints["open_llama"]
    expected = alone(harness, request(model, "a", max_tokens=20), prompt_of(5))
    genuine, scheduler = harness.scheduler._prefill_chunk, harness.scheduler

    def failing() -> None:
        row = scheduler._prefilling
        if row is not None and row.request.id == "bad":
            raise RuntimeError("out of paper")
        genuine()

    monkeypatch.setattr(scheduler, "_prefill_chunk", failing)
    bad = Row(request(model, "bad"), harness.events.put, prompt_of(5))
    harness.rows["bad"], harness.said["bad"] = bad, []
    neighbour: list[Row] = []

    def happened(event: Event) -> None:  # on the scheduler's thread: both in the same turn
        harness.events.put(event)
        if isinstance(event, Token) and event.id == "a" and not bad.done and neighbour:
            scheduler.cancel(neighbour.pop())
            scheduler.submit(bad)

    harness.said["a"] = []
    neighbour.append(harness.submit(request(model, "b", max_tokens=400), prompt_of(7)))
    while not harness.tokens("b"):
        harness.next()
    scheduler.submit(Row(request(model, "a", max_tokens=20), happened, prompt_of(5)))
    harness.wait_all()
    assert isinstance(harness.said["bad"][-1], Failed)
    assert harness.tokens("a") == expected


def test_a_failed_read_of_the_last_token_ends_its_row_once_and_the_engine_goes_on(
    harness: Harness, checkpoints: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row has left the batch by then; only the launched step still knows it."""
    failures = []

    def failing(self: Launch) -> list[int]:
        failures.append(self)
        raise RuntimeError("unreadable")

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "token_ids", failing)
        harness.submit(request(checkpoints["open_llama"], "bad", max_tokens=1), prompt_of(5))
        harness.wait_all()
    harness.submit(request(checkpoints["open_llama"], "good"), prompt_of(5))
    harness.wait_all()
    assert isinstance(harness.said["bad"][-1], Failed)
    assert isinstance(harness.said["good"][-1], Finished)
    assert len(failures) == 1


def test_logprobs_are_those_of_the_greedy_token_and_batch_with_rows_that_want_none(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    model = checkpoints["open_llama"]
    harness.submit(request(model, "a", logprobs=True, top_logprobs=3), prompt_of(5))
    harness.submit(request(model, "b"), prompt_of(6))
    harness.submit(request(model, "c", logprobs=True), prompt_of(7))
    harness.wait_all()
    for event in harness.said["a"]:
        if isinstance(event, Token):
            assert event.logprob is not None and event.logprob.token_id == event.token_id
            assert len(event.top) == 3 and event.top[0] == event.logprob  # greedy: the best one
            assert event.top[0].logprob >= event.top[1].logprob >= event.top[2].logprob
            assert event.logprob.logprob <= 0
    assert all(e.logprob is None for e in harness.said["b"] if isinstance(e, Token))
    assert all(e.logprob and not e.top for e in harness.said["c"] if isinstance(e, Token))


def test_a_step_is_read_while_the_next_one_runs() -> None:
    """To read is to compute nothing: that would begin only when what runs has ended."""
    rows = [
        Row(request(ModelRef("m", "m"), f"{i}", logprobs=True, top_logprobs=2), print)
        for i in range(2)
    ]
    logits = mx.random.normal((2, 50))
    launch = Launch.of(rows, logits, mx.argmax(logits, axis=-1))
    launch.start()
    large = mx.random.normal((2**22,))
    mx.eval(large, launch.tokens)
    began = time.monotonic()
    mx.async_eval(mx.sort(large))
    launch.token_ids()
    for index in range(2):
        assert not launch.was_broken(index)
        assert len(launch.logprobs_of(index, 2)[1]) == 2
    read = time.monotonic()
    mx.eval(mx.zeros(1) + 1)
    assert read - began < (time.monotonic() - began) / 2


def test_where_steps_are_read_first_a_token_is_sent_before_the_next_one_is_launched(
    checkpoints: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    genuine = Launch.start

    def start(self: Launch) -> None:
        order.append("step")
        genuine(self)

    def happened(event: Event) -> None:
        if isinstance(event, Token):
            order.append("token")
        elif isinstance(event, (Finished, Failed)):
            scheduler.stop()

    monkeypatch.setattr(Launch, "start", start)
    scheduler = Scheduler(reads_first=True)
    asked = request(checkpoints["open_llama"], "a", max_tokens=5)
    scheduler.submit(Row(asked, happened, prompt_of(9)))
    scheduler.run()
    assert order == ["step", "token"] * 5


def test_a_stop_string_ends_the_text_before_it(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    model = checkpoints["open_llama"]
    harness.submit(request(model, "free", max_tokens=40), prompt_of(5))
    harness.wait_all()

    def text(request_id: str) -> str:
        pieces = [e.text for e in harness.said[request_id] if isinstance(e, Token)]
        end = harness.said[request_id][-1]
        assert isinstance(end, Finished)
        return "".join(pieces) + end.text

    full = text("free")
    stop = full[7:10]
    harness.submit(request(model, "stopped", max_tokens=40, stop=[stop, "never"]), prompt_of(5))
    harness.wait_all()
    assert text("stopped") == full[: full.index(stop)]
    assert harness.said["stopped"][-1].reason == "stop"  # type: ignore[union-attr]


def test_states_are_released_when_rows_end(
    harness: Harness, checkpoints: dict[str, ModelRef]
) -> None:
    for i in range(4):
        harness.submit(request(checkpoints["recurrent_gemma"], f"r{i}"), prompt_of(20))
    harness.wait_all()
    harness.submit(LoadModel("sync", checkpoints["recurrent_gemma"]), [])
    harness.wait_all()
    harness.close()
    assert harness.scheduler.snapshot.running == 0
    assert harness.scheduler.snapshot.state_bytes == 0
    assert harness.scheduler.snapshot.queued == 0
