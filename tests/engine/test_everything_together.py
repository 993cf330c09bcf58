"""Everything a client may ask for at once, at random, in little memory: every request ends exactly
once, an answer that was not cut short is the one that its request gives alone, and nothing is left.

The scheduler runs on the test's own thread and a round acts on its events, so that a round is the
same each time but for what depends on the clock. What is alone runs without speculation, memory
limit and prefix cache. Near ties as in `test_batch_equals_single.py`.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from app.engine.batch import Launch, Row
from app.engine.constraint import Constraint
from app.engine.matcher import Matchers
from app.engine.prefix_files import PrefixFiles
from app.engine.protocol import (
    DraftModel,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    LoadModel,
    ModelRef,
    PromptLookup,
    Sampling,
    Token,
)
from app.engine.scheduler import Scheduler
from mlxmodels.footprint import footprint

from ..rounds import rounds
from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model
from .test_batch_equals_single import Entry, first_difference, is_near_tie

# Wide enough for its states to count beside the weights.
GROWING = OPEN_LLAMA | {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
FAMILIES = {"growing": GROWING, "griffin": RECURRENT_GEMMA}
REQUESTS = 40
# When a request joins, instead of after a number of tokens; when all have ended it does anyway.
NEXT_END, UNLOADED = -1, sys.maxsize
CHATS, CLIENTS = ("", "one", "two"), ("", "ann", "bob")
BROKEN, NO_NUMBER = "broken", "no number"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ModelRef]]:
    """Of each family a model and another that may draft for it."""
    root = tmp_path_factory.mktemp("together")

    def written(name: str, seed: int) -> ModelRef:
        path = write_model(root / f"{name}-{seed}", FAMILIES[name], seed=seed)
        return ModelRef(path.name, str(path))

    return {name: [written(name, seed) for seed in range(2)] for name in FAMILIES}


class Constraints:
    """Starts what follows constraints; the tokenizer of all these models is the same."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._matchers = Matchers()

    def follow(self, row: Row, path: str) -> None:
        if isinstance(row.request, GenerationRequest) and row.request.constraint is not None:
            start = self._matchers.start(path, row.request.constraint)
            row.matcher = self._loop.run_until_complete(start)

    def close(self) -> None:
        self._loop.run_until_complete(self._matchers.close())
        self._loop.close()


@pytest.fixture(scope="module")
def constraints() -> Iterator[Constraints]:
    started = Constraints()
    yield started
    started.close()


@dataclass
class Asked:
    """One request, what is done with it, and what was said to it."""

    request: GenerationRequest | LoadModel
    prompt: list[int]
    joins_after: int = 0
    """Tokens given after the one before was submitted; does not wait when all have ended."""
    follows: Asked | None = None
    """Its prompt goes on from that one's prompt and answer, as far as those are there by then."""
    boundaries: list[int] = field(default_factory=list)
    cancelled_at: int | None = None
    """After so many of its tokens; 0: when it is submitted."""
    forgets: str | None = None
    """The chat that is forgotten just after it was submitted."""
    events: list[Event] = field(default_factory=list)

    def begin(self) -> None:
        """Settle its prompt."""
        if self.follows is not None:
            head = [*self.follows.prompt, *self.follows.ids][: 420 - len(self.prompt)]
            self.prompt, self.boundaries = [*head, *self.prompt], [len(head)]

    @property
    def tokens(self) -> list[Token]:
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def end(self) -> Finished | Failed:
        (end,) = [event for event in self.events if isinstance(event, (Finished, Failed))]
        return end


def drawn(draw: random.Random, models: dict[str, list[ModelRef]]) -> list[Asked]:
    """Requests of every kind, for one model and then the other, with prompts that go on."""
    asked: list[Asked] = []
    family = draw.choice([*FAMILIES])
    drafts = {family: draw.choice(models[family]) for family in FAMILIES}
    for number in range(REQUESTS):
        if draw.random() < 0.04:
            family = draw.choice([*FAMILIES])
        model = models[family][0]
        keep_alive_s = draw.choice([None, None, 0.0, -1.0])
        common: dict[str, Any] = {"id": f"{number}", "model": model, "keep_alive_s": keep_alive_s}
        joins_after = draw.choice(
            [0, 0, 0, 0, 0, NEXT_END, *draw.sample(range(1, 12), 2), UNLOADED]
        )
        if draw.random() < 0.04:
            asked.append(Asked(LoadModel(**common), [], joins_after))
            continue
        length = draw.choice([1, 2, 7, 8, 9, 40, 41, 130])
        prompt = draw.choices(range(256), k=length)
        earlier = [one for one in asked if one.prompt and one.prompt[-1] < 259]
        kind = draw.choice(["plain", "plain", "plain", "constrained", "lookup", "draft"])
        speculation = {
            "lookup": PromptLookup(ngram=draw.randint(1, 3)),
            "draft": DraftModel(drafts[family], tokens=draw.randint(1, 5)),
        }.get(kind)
        pattern = draw.choice(["[a-f]{3,12}", "(yes|no)", "x[0-9]*"])
        request = GenerationRequest(
            **common,
            prompt_tokens=[0],
            sampling=sampling(draw),
            max_tokens=draw.choice([1, 9, 24, 40, 40]),
            speculation=speculation,
            constraint=Constraint("regex", pattern) if kind == "constrained" else None,
            logprobs=draw.random() < 0.3,
            top_logprobs=draw.choice([0, 3]),
            stop=draw.sample(["a", "e", "7", "\n"], draw.choice([0, 0, 1, 3])),
            chat=draw.choice(CHATS),
            client=draw.choice(CLIENTS),
            wait_for_model=draw.random() < 0.9,
        )
        follows = draw.choice(earlier) if earlier and draw.random() < 0.6 else None
        one = Asked(request, prompt, joins_after, follows=follows)
        fate = draw.random()
        if fate < 0.25:
            one.cancelled_at = draw.choice([0, 0, 1, 5, 9])
        elif fate < 0.3:
            one.forgets = draw.choice(CHATS)
        elif fate < 0.5:
            fault = draw.choice([BROKEN, NO_NUMBER])
            one.request = msgspec.structs.replace(request, id=f"{number} {fault}")
            one.joins_after = NEXT_END  # among what the end of another leaves in flight
        elif fate < 0.53:
            one.prompt = [*prompt, 999]
        asked.append(one)
    return asked


def sampling(draw: random.Random) -> Sampling:
    seed = draw.randrange(2**31)
    return draw.choice(
        [
            Sampling(temperature=0),
            Sampling(temperature=1.0, top_p=0.9, seed=seed),
            Sampling(temperature=1.0, xtc_probability=0.5, seed=seed),
            Sampling(temperature=0.7, repetition_penalty=1.2, logit_bias={3: 2.0}, seed=seed),
        ]
    )


def play(asked: list[Asked], scheduler: Scheduler, constraints: Constraints) -> list[Row]:
    """Submit all of them, run until they have ended, and give the rows."""
    waiting, rows = list(asked), dict[str, Row]()
    ended: set[str] = set()
    given, given_at_last = 0, 0

    def is_due(at: int, *, at_end: bool) -> bool:
        after = given - given_at_last
        return len(ended) == len(rows) or (at_end if at == NEXT_END else after >= at)

    def join(*, at_end: bool = False) -> None:
        nonlocal given_at_last
        while waiting and is_due(waiting[0].joins_after, at_end=at_end):
            one = waiting.pop(0)
            given_at_last = given
            one.begin()
            row = Row(one.request, functools.partial(happened, one), one.prompt, one.boundaries)
            rows[one.request.id] = row
            constraints.follow(row, asked[0].request.model.path)
            scheduler.submit(row)
            if one.cancelled_at == 0:
                scheduler.cancel(row)
            if one.forgets is not None:
                scheduler.forget(one.forgets, forgotten.append)
            if one.joins_after == UNLOADED:
                return

    def happened(one: Asked, event: Event) -> None:
        nonlocal given
        assert one.request.id not in ended, f"{one.request.id} went on after its end: {event}"
        one.events.append(event)
        if isinstance(event, Token):
            given += 1
            if len(one.tokens) == one.cancelled_at:
                scheduler.cancel(rows[one.request.id])
        elif isinstance(event, (Finished, Failed)):
            ended.add(one.request.id)
        if len(ended) == len(asked):
            scheduler.stop()
        elif len(ended) == len(rows) and waiting[0].joins_after == UNLOADED and will_unload():
            return  # until the model is gone
        else:
            join(at_end=isinstance(event, (Finished, Failed)))

    def will_unload() -> bool:
        return scheduler._resident is not None and scheduler._keep_alive.remaining_s() == 0

    forgotten: list[Any] = []
    scheduler.on_idle = join
    join()
    watchdog = threading.Timer(120, scheduler.stop)
    watchdog.start()
    try:
        scheduler.run()
    finally:
        watchdog.cancel()
    never = [one.request.id for one in asked if one.request.id not in ended]
    assert not never, f"these have not ended: {never}"
    assert set(forgotten) <= {None}
    return list(rows.values())


@pytest.mark.parametrize("number", rounds(2))
def test_all_of_it_at_once(
    models: dict[str, list[ModelRef]],
    constraints: Constraints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
    number: int,
) -> None:
    draw = random.Random(number + 2)
    asked = drawn(draw, models)
    taken = footprint(Path(models["growing"][0].path), expand=True)
    budget = 2 * taken.weight_bytes + taken.row_bytes(64, 420, rows=draw.choice([1, 4, 8, 8]))
    genuine = Scheduler._prefill_chunk

    def prefill_chunk(self: Scheduler) -> None:
        row = self._prefilling
        if row is not None and row.request.id.endswith(BROKEN):
            raise RuntimeError("planted")
        genuine(self)

    genuinely_broken = Launch.was_broken

    def was_broken(self: Launch, index: int) -> bool:
        row = self.rows[index]
        is_planted = row.request.id.endswith(NO_NUMBER) and row.generated == 2
        return is_planted or genuinely_broken(self, index)

    (tmp_path / "prefixes").mkdir(0o700)
    gc.collect()
    before = mx.get_active_memory()
    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "_prefill_chunk", prefill_chunk)
        patch.setattr(Launch, "was_broken", was_broken)
        scheduler = Scheduler(
            2**20,
            PrefixFiles(tmp_path / "prefixes"),
            memory_bytes=budget,
            keep_alive_s=0,
            reads_first=False,
        )
        rows = play(asked, scheduler, constraints)
    view = scheduler.snapshot
    assert (view.running, view.queued, view.state_bytes) == (0, 0, 0)
    assert not scheduler._active and not scheduler._queue
    for row in rows:
        assert not row.caches and row.lane is None
        assert row.matcher is None or row.matcher._row.fileno() == -1
    assert all("planted" in str(record.exc_info) for record in caplog.records)
    caplog.clear()  # what was raised refers to what it was raised in
    del row, rows
    scheduler._unload()
    assert mx.get_active_memory() - before < 10_000

    alone = [
        Asked(msgspec.structs.replace(one.request, speculation=None), one.prompt, UNLOADED)
        for one in asked
        if isinstance(one.request, GenerationRequest) and one.prompt[-1] < 259
    ]
    play(alone, Scheduler(), constraints)
    expected = {one.request.id: one for one in alone}
    for one in asked:
        check(one, expected.get(one.request.id))
    ends = Counter(e.code if isinstance(e := one.end, Failed) else e.reason for one in asked)
    record_property("ends", dict(ends))


def check(one: Asked, alone: Asked | None) -> None:
    """Whether a request ended as it should, given what it was and how it goes alone."""
    request, end = one.request, one.end
    if isinstance(end, Failed):
        allowed = {"out_of_memory", "model_busy"}
        if one.prompt[-1:] == [999]:
            allowed.add("invalid_request")
        if request.id.endswith(BROKEN):
            allowed.add("engine_error")
        if request.id.endswith(NO_NUMBER):
            allowed.add("invalid_numbers")
        assert end.code in allowed, end
    if alone is None:
        assert isinstance(request, LoadModel) or isinstance(end, Failed) or one.cancelled_at == 0
        return
    assert isinstance(request, GenerationRequest) and isinstance(alone.end, Finished), alone.end
    whole = isinstance(end, Finished) and end.reason != "cancelled"
    got, expected = one.ids, alone.ids if whole else alone.ids[: len(one.ids)]
    position = first_difference(got, expected)
    if position is not None and request.constraint is None:
        plain = msgspec.structs.replace(request, speculation=None)
        assert is_near_tie(Entry(plain, one.prompt), alone.ids, position, got[position]), (
            f"{request.id}: token {position} is {got[position]} and {expected[position]} alone"
        )
        return
    assert got == expected, request.id
    for token, other in zip(one.tokens, alone.tokens, strict=False):
        assert (token.logprob is None) == (other.logprob is None) == (not request.logprobs)
        if token.logprob is not None and other.logprob is not None:
            assert token.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-3)
    if whole:
        assert isinstance(end, Finished) and end.reason == alone.end.reason
