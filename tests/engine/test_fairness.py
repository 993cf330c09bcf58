"""Who waits for whom: clients take turns, models take turns, limits say which they are, and the
position that a request is told is the truth.

The scheduler runs on the test's own thread and the tests act on its events, so that each run is the
same every time.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from app.engine import scheduler as scheduling
from app.engine import waiting
from app.engine.batch import Row
from app.engine.protocol import (
    Accepted,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    LoadModel,
    ModelRef,
    Progress,
    Sampling,
    Token,
)
from app.engine.scheduler import Scheduler
from app.engine.turns import Turns

from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRef]:
    root = tmp_path_factory.mktemp("fairness")
    return [
        ModelRef("first", str(write_model(root / "first", OPEN_LLAMA))),
        ModelRef("second", str(write_model(root / "second", RECURRENT_GEMMA))),
    ]


class Play:
    """A scheduler that runs on this thread until everything submitted has ended."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.events: list[Event] = []
        self.on_event: Callable[[Event], None] = lambda event: None
        self._open: set[str] = set()

    def submit(
        self,
        model: ModelRef,
        id: str,
        client: str = "",
        *,
        connection: str = "",
        tokens: int = 3,
        prompt: int = 4,
    ) -> Row:
        request = GenerationRequest(
            id=id,
            model=model,
            prompt_tokens=[0],
            client=client,
            sampling=Sampling(temperature=0),
            max_tokens=tokens,
        )
        return self._submit(Row(request, self._happened, [1] * prompt, connection=connection))

    def load(self, model: ModelRef, id: str) -> Row:
        return self._submit(Row(LoadModel(id, model), self._happened))

    def _submit(self, row: Row) -> Row:
        self._open.add(row.request.id)
        self.scheduler.submit(row)
        return row

    def _happened(self, event: Event) -> None:
        self.events.append(event)
        self.on_event(event)
        if isinstance(event, (Finished, Failed)):
            self._open.remove(event.id)
            if not self._open:
                self.scheduler.stop()

    def run(self) -> None:
        self.scheduler.run()
        assert not self._open

    def ids(self, kind: type[Event]) -> list[str]:
        return [event.id for event in self.events if isinstance(event, kind)]

    @property
    def loads(self) -> int:
        assert self.scheduler.model_loads == sum(
            isinstance(event, Progress) and event.phase == "load" and event.processed > 0
            for event in self.events
        )
        return self.scheduler.model_loads

    def ahead(self, id: str) -> list[int]:
        """What a request was told about how many are ahead of it."""
        return [
            event.total
            for event in self.events
            if isinstance(event, Progress) and event.phase == "queue" and event.id == id
        ]


def test_one_client_with_many_requests_does_not_delay_another_with_one(
    models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "MAX_ROWS", 1)
    play = Play()
    for i in range(30):
        play.submit(models[0], f"many {i}", "many")
    play.submit(models[0], "one", "one")
    play.run()
    order = play.ids(Accepted)
    assert order.index("one") <= 1
    assert [id for id in order if id != "one"] == [f"many {i}" for i in range(30)]  # FIFO


def test_clients_are_told_apart_by_connection_where_they_do_not_name_themselves(
    models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "MAX_ROWS", 1)
    play = Play()
    for i in range(5):
        play.submit(models[0], f"a {i}", connection="connection 1")
    play.submit(models[0], "b", connection="connection 2")
    play.submit(models[0], "c", "c", connection="connection 1")
    play.run()
    assert play.ids(Accepted) == ["a 0", "b", "c", "a 1", "a 2", "a 3", "a 4"]


def test_a_free_row_goes_to_the_client_with_the_fewest_running(
    models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "long" holds two of three rows; the third serves "short" for as long as that asks."""
    monkeypatch.setattr(scheduling, "MAX_ROWS", 3)
    play = Play()
    for i in range(4):
        play.submit(models[0], f"long {i}", "long", tokens=60)
    for i in range(8):
        play.submit(models[0], f"short {i}", "short")
    play.run()
    order = play.ids(Accepted)
    assert order.index("long 2") > order.index("short 4")
    running: list[str] = []
    for event in play.events:
        if isinstance(event, Accepted):
            running.append(event.id)
        elif isinstance(event, Finished):
            running.remove(event.id)
        waits = order[order.index(running[-1]) + 1 :] if running else []
        if any(id.startswith("short") for id in waits):
            assert sum(id.startswith("long") for id in running) <= 2


def test_ever_new_names_do_not_starve_a_client() -> None:
    @dataclass
    class One:
        client: str

    turns, patient = Turns(), One("patient")
    served = []
    for i in range(1000):
        queue = [patient, One(f"new {i}"), One(f"newer {i}")]
        if "patient" in served:
            break
        chosen = turns.first(queue, {"patient": 3})
        turns.serve(chosen.client, {one.client for one in queue})
        served.append(chosen.client)
    assert served.count("patient") == 1 and len(served) <= 66


@pytest.mark.parametrize("seed", range(5))
def test_order_is_what_first_and_serve_do_and_shares_fairly(seed: int) -> None:
    @dataclass(frozen=True)
    class One:
        client: str
        number: int

    draw, turns = random.Random(seed), Turns()
    for client in draw.choices("abcd", k=20):
        turns.serve(client, draw.choices("abcd", k=2))
    queue = [One(draw.choice("abcde"), i) for i in range(40)]
    serving = {client: draw.randrange(3) for client in "abcde"}
    expected = turns.order(queue, serving)
    order: list[One] = []
    while queue:
        chosen = turns.first(queue, serving)
        queue.remove(chosen)
        serving[chosen.client] += 1
        turns.serve(chosen.client, {one.client for one in queue})
        order.append(chosen)
    assert order == expected
    for client in "abcde":
        numbers = [one.number for one in order if one.client == client]
        assert numbers == sorted(numbers)


def test_positions_are_true_at_arrival_and_after_every_change(
    models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "MAX_ROWS", 1)
    draw, play = random.Random(7), Play()
    rows = {f"{i}": play.submit(models[0], f"{i}", draw.choice("abc"), tokens=5) for i in range(20)}

    def cancel_one(event: Event) -> None:
        if isinstance(event, Accepted) and event.id == "0":
            play.scheduler.cancel(rows["13"])

    play.on_event = cancel_one
    play.run()
    order = play.ids(Accepted)
    assert len(order) == 19
    for at, id in enumerate(order):
        told = play.ahead(id)
        assert told == sorted(told, reverse=True)
        assert at < 2 or (len(told) >= at and told[-1] == 0)
    admitted = 0
    is_cancelled = False
    for event in play.events:
        admitted += isinstance(event, Accepted)
        is_cancelled = is_cancelled or (isinstance(event, Finished) and event.id == "13")
        if isinstance(event, Progress) and event.phase == "queue" and event.id != "13":
            # All that come before it and have not been admitted, and the cancelled one until then.
            surplus = event.total - (order.index(event.id) - admitted)
            assert surplus == 0 or (surplus == 1 and not is_cancelled)


def test_a_stream_of_requests_for_one_model_does_not_starve_one_for_another(
    models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MAX_TURN_S", 0)  # the first model's turn is over at once
    first, second = models
    play, count, asked = Play(), 2, False
    play.submit(first, "0", tokens=8)
    play.submit(first, "1", tokens=5)

    def go_on(event: Event) -> None:
        nonlocal count, asked
        if isinstance(event, Token) and event.id == "0" and not asked:
            asked = True
            play.submit(second, "other")
        if (
            isinstance(event, Finished)
            and event.id != "other"
            and "other" not in play.ids(Finished)
        ):
            assert count < 50, "the other model never came"
            play.submit(first, f"{count}", tokens=5)
            count += 1

    play.on_event = go_on
    play.run()
    # What ran when it came, and what came before it; nothing else.
    assert play.ids(Accepted).index("other") <= 3
    assert play.loads == 3


def test_requests_in_turn_for_two_models_load_each_once(models: list[ModelRef]) -> None:
    play = Play()
    for i in range(12):
        play.submit(models[i % 2], f"{i}", f"{i % 3}")
    play.run()
    assert play.loads == 2
    assert {int(id) % 2 for id in play.ids(Accepted)[:6]} == {0}


def test_while_its_turn_lasts_a_model_stays_for_what_comes(
    models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two streams of one request after the other for each model; without turns each would swap."""
    monkeypatch.setattr(waiting, "MAX_TURN_S", 3600)
    monkeypatch.setattr(waiting, "TURN_PER_LOAD", 1e9)
    play = Play()
    left = {"a": 10, "b": 10}

    def submit(name: str) -> None:
        left[name] -= 1
        play.submit(models["ab".index(name)], f"{name} {left[name]}", name)

    def go_on(event: Event) -> None:
        # As the next one arrives before the one before has ended, there is always one.
        if isinstance(event, Accepted) and left[event.id[0]]:
            submit(event.id[0])

    play.on_event = go_on
    submit("a")
    submit("b")
    play.run()
    assert play.loads == 2
    assert len(play.ids(Finished)) == 20


def test_a_turn_ends_after_a_multiple_of_the_load_and_never_late(
    models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now)

    def row(model: ModelRef, id: str) -> Row:
        request = GenerationRequest(id=id, model=model, prompt_tokens=[0])
        return Row(request, lambda event: None, [0], submitted_s=0.0)

    for load_s, lasts_s in ((2.0, 8.0), (60.0, 30.0)):
        queue, now = waiting.WaitingQueue(), 100.0
        queue.begin_turn(load_s)
        other, mine = row(models[1], "other"), row(models[0], "mine")
        queue.add(other)
        queue.add(mine)
        now += lasts_s - 0.1
        assert queue.next(models[0], {}) is mine
        now += 0.2
        assert queue.next(models[0], {}) is other
        queue.remove(other)
        assert queue.next(models[0], {}) is mine


def test_a_client_cannot_fill_the_queue_for_all(
    models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MAX_QUEUE", 6)
    monkeypatch.setattr(waiting, "MAX_QUEUE_PER_CLIENT", 3)
    play = Play()
    for i in range(5):
        play.submit(models[0], f"many {i}", "many")
    play.submit(models[0], "one", "one")
    for i in range(3):
        play.submit(models[0], f"more {i}", "more")
    play.run()
    failed = {event.id: event for event in play.events if isinstance(event, Failed)}
    assert sorted(failed) == ["many 3", "many 4", "more 2"]
    for id, message in (("many 3", "of this client are waiting already, of 3 at most"),
                        ("more 2", "6 requests are waiting already, of 6 at most")):  # fmt: skip
        assert failed[id].code == "queue_full" and failed[id].retry_after
        assert message in failed[id].message
    assert waiting.MAX_QUEUE_PER_CLIENT < waiting.MAX_QUEUE


def test_a_load_takes_its_turn_like_any_request(
    models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MAX_TURN_S", 0)
    play = Play()
    play.submit(models[0], "a")
    play.load(models[1], "load")
    play.submit(models[0], "b")
    play.run()
    assert play.ids(Finished) == ["a", "b", "load"]
    assert play.loads == 2


def test_cancelled_in_the_queue_nobody_waits_for_it(
    models: list[ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "MAX_ROWS", 1)
    play = Play()
    play.submit(models[0], "a", tokens=30)
    other = play.submit(models[1], "b")
    play.submit(models[0], "c")

    def cancel(event: Event) -> None:
        if isinstance(event, Token) and not play.ids(Finished):
            play.scheduler.cancel(other)

    play.on_event = cancel
    play.run()
    assert play.loads == 1 and play.ids(Finished) == ["b", "a", "c"]
    assert len(play.scheduler._queue) == 0
